"""Documents that exist on every machine: the documentation of the standard library of the running Python.

The sources are parsed with `ast` and not imported: some modules open windows or print text when imported.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MAX_DOC_CHARACTERS = 3000
MAX_SIGNATURE_CHARACTERS = 120
VALIDATION_PERCENT = 15
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "site-packages"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, slots=True)
class Document:
    """A function, class or method, or a topic of the language reference (without a signature).

    Args:
        module: its module, such as "shutil"; for a topic, "topic <name>".
        name: the full name, such as "shutil.copytree".
        signature: such as "(src, dst, *, follow_symlinks=True)"; None if there is none, or a very long one.
        doc: the docstring, at most 3,000 characters.
    """

    module: str
    name: str
    signature: str | None
    doc: str

    @property
    def header(self) -> str:
        """The line that states the signature."""
        return f"### {self.name}{self.signature or ''}\n"

    @property
    def text(self) -> str:
        return f"{self.header}{self.doc}\n\n"

    @property
    def is_validation(self) -> bool:
        """Depends on the top-level module only: the same for every seed and on every machine."""
        top_level = self.module.split(".")[0]
        return int.from_bytes(hashlib.sha256(top_level.encode()).digest()[:4], "big") % 100 < VALIDATION_PERCENT


@lru_cache(maxsize=1)
def load_documents() -> tuple[Document, ...]:
    """All documents, ordered by file and line; names are unique."""
    documents: dict[str, Document] = {}
    for module, path in _source_files():
        for document in _documents_of(module, ast.parse(path.read_bytes())):
            # Some functions are defined once per platform: the first definition is used.
            documents.setdefault(document.name, document)
    for document in _topics():
        documents.setdefault(document.name, document)
    return tuple(documents.values())


def documents_fingerprint() -> str:
    """Identifies the documentation of a Python release."""
    documents = load_documents()
    digest = hashlib.sha256("\0".join(d.text for d in documents).encode()).hexdigest()
    return f"{len(documents)} documents of Python {sys.version.split()[0]}, {digest[:12]}"


def _source_files() -> Iterator[tuple[str, Path]]:
    """Public modules and their files, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    # Not everything below `root`: site-packages may be there too.
    public = [name for name in sys.stdlib_module_names if not name.startswith("_")]
    files = [path for name in public for path in (root / f"{name}.py", *(root / name).rglob("*.py")) if path.is_file()]
    for path in sorted(files):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith("_") or part in _SKIPPED for part in parts):
            yield ".".join(parts), path


def _documents_of(module: str, tree: ast.Module) -> Iterator[Document]:
    for prefix, node, in_class in _definitions(tree, module, in_class=False):
        doc = ast.get_docstring(node, clean=False)
        if doc and (doc := inspect.cleandoc(doc)[:MAX_DOC_CHARACTERS].rstrip()):
            yield Document(module, f"{prefix}.{node.name}", _signature(node, in_class), doc)


def _definitions(tree: ast.AST, prefix: str, in_class: bool) -> Iterator[tuple[str, _Definition, bool]]:
    """Public definitions with their prefix; also those inside `if` or `try`, but not those inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Definition):
            if not node.name.startswith("_"):
                yield prefix, node, in_class
                if isinstance(node, ast.ClassDef):
                    yield from _definitions(node, f"{prefix}.{node.name}", in_class=True)
        elif not isinstance(node, ast.expr):
            yield from _definitions(node, prefix, in_class)


def _signature(node: _Definition, in_class: bool) -> str | None:
    """The signature as a caller sees it: a class has that of its `__init__`, and `self` or `cls` is left out."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return None
        node, in_class = inits[0], True
    elif any(d.endswith("property") or d.endswith(".setter") for d in decorators):
        return None
    arguments = node.args
    if in_class and "staticmethod" not in decorators:
        if arguments.posonlyargs:
            arguments.posonlyargs = arguments.posonlyargs[1:]
        elif arguments.args:
            arguments.args = arguments.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    signature = f"({ast.unparse(arguments)}){returns}"
    return signature if len(signature) <= MAX_SIGNATURE_CHARACTERS else None


def _topics() -> Iterator[Document]:
    """The language reference, if this Python has it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        text = inspect.cleandoc(topics[name])[:MAX_DOC_CHARACTERS].rstrip()
        yield Document(f"topic {name}", f"topic {name}", None, text)
