"""A file stays below 350 lines and a function on one screen: both are read off the source here."""

import ast

from tests.helpers import ROOT

FOLDERS = ("lrsa_ds", "launch", "recipes")
FILE_LINES, FUNCTION_LINES = 350, 60


def too_long(name, source):
    """Yields a sentence for the file, if it is too long, and for each function in it that is."""
    if (count := len(source.splitlines())) > FILE_LINES:
        yield f"{name} has {count} lines: at most {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = node.end_lineno - node.lineno + 1
            if count > FUNCTION_LINES:
                yield f"{name}:{node.lineno} {node.name} has {count} lines: at most {FUNCTION_LINES}"


def test_no_file_and_no_function_is_too_long():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        sentence
        for path in files
        for sentence in too_long(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert files
    assert not found, "\n".join(found)


def test_what_is_too_long_is_reported():
    assert not list(too_long("a.py", "def f():\n" + "    x = 1\n" * 59 + "x = 2\n" * 290))
    assert list(too_long("a.py", "x = 1\n" * 351)) == ["a.py has 351 lines: at most 350"]
    method = "class A:\n    async def f(self):\n" + "        x = 1\n" * 60
    assert list(too_long("a.py", method)) == ["a.py:2 f has 61 lines: at most 60"]
