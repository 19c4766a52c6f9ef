"""The page of all error sentences, read from the code: MkDocs gets it from docs/hooks.py when it builds the site.

A sentence is the text of an `LRSAError`, or of a `require` that raises one; what depends on the case is shown as ….
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("launch", "lrsa_ds", "recipes")
RAISERS = {"require": 1, "LRSAError": 0}  # the place of the sentence among the arguments


def text_of(node: ast.expr) -> str | None:
    """The text of a string, with … for what is put in; None for what is no string."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join((text_of(v) or "") if isinstance(v, ast.Constant) else "…" for v in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{text_of(left) or '…'}{text_of(right) or '…'}"
        case ast.IfExp(body=body, orelse=orelse):
            return text_of(body) or text_of(orelse)
    return None


def raised(tree: ast.Module) -> Iterator[ast.expr]:
    """What errors are raised with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISERS:
            place = RAISERS[node.func.id]
            if len(node.args) > place:
                yield node.args[place]


def sentences_of(tree: ast.Module, builders: set[str]) -> Iterator[str]:
    """The sentences of a file, and those that its functions among `builders` return."""
    nodes = list(raised(tree))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in builders:
            nodes += [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value is not None]
    for node in nodes:
        text = text_of(node)
        if text and len(text.strip("… .")) > 12:
            yield " ".join(text.split())


def all_sentences() -> dict[str, list[str]]:
    """The sentences of each file that has any, in the order of the files."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    calls = [node for tree in trees.values() for node in raised(tree) if isinstance(node, ast.Call)]
    builders = {node.func.id for node in calls if isinstance(node.func, ast.Name)} | {"unknown_key_sentence"}
    found = {path: sorted(set(sentences_of(tree, builders))) for path, tree in trees.items()}
    return {str(path.relative_to(ROOT)): sentences for path, sentences in found.items() if sentences}


def about(file: str) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text())) or ""
    return text.split("\n")[0].split(". ")[0].rstrip(".")


def escaped(sentence: str) -> str:
    """Without what Markdown would take for markup."""
    return re.sub(r"([*_\[\]`])", r"\\\1", sentence.replace("<", "&lt;"))


def page() -> str:
    found = all_sentences()
    parts = [
        "# Every error sentence",
        f"The {sum(map(len, found.values())):,} sentences by which commands refuse a mistake, read from the code when "
        "this site is built. A sentence names the cause, the key and the valid values; … stands for what depends on "
        "the case. [Troubleshooting](troubleshooting.md) has the frequent ones with what to do.",
    ]
    for file, sentences in found.items():
        parts += [f"## {file}", f"{about(file)}.", "\n".join(f"- {escaped(sentence)}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"
