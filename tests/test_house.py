"""The house stays in order: sizes of the rooms, columns, wide and long functions, import arrows."""

import ast
import glob
import io
import os
import subprocess
import sys
import tokenize

from conftest import ROOT

BUDGET = {"model.py": 420, "train.py": 300, "distill.py": 380, "vision.py": 450, "sample.py": 220}
BUDGET |= {"export.py": 700, "bench.py": 700, "lib": 900, "data": 1800, "tests": 3000}
COLUMNS, PARAMETERS, FUNCTION = 100, 7, 70
SKIP = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def files():
    for pattern in ("*.py", "lib/*.py", "data/*.py", "tests/*.py"):
        for name in sorted(glob.glob(pattern, root_dir=ROOT)):
            with open(os.path.join(ROOT, name), encoding="utf-8") as file:
                source = file.read()
            yield name.replace(os.sep, "/"), source, ast.parse(source)


def code_lines(source, tree):
    """Numbers of the lines with a token on them, less docstrings."""
    lines, docs = set(), set()
    for node in ast.walk(tree):
        documented = isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module))
        if documented and ast.get_docstring(node, clean=False):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*SKIP, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docs


def test_rooms_are_within_their_budgets():
    rooms = {}
    for name, source, tree in files():
        room = name.split("/")[0]
        rooms[room] = rooms.get(room, 0) + len(code_lines(source, tree))
    over = {room: n for room, n in rooms.items() if n > BUDGET[room]}
    assert not over, f"lines of code: {over}: shorten, or raise BUDGET above, if it is worth it"


def test_lines_and_functions_are_short():
    wrong = []
    for name, source, tree in files():
        lines = enumerate(source.split("\n"), 1)
        wrong += [f"{name}:{i}" for i, line in lines if len(line) > COLUMNS]
        for node in [] if name.startswith("tests") else ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                args = [arg.arg for arg in node.args.args + node.args.kwonlyargs]
                wide = len(args) - (args[:1] in (["self"], ["cls"])) > PARAMETERS
                long = node.end_lineno - node.lineno + 1 > FUNCTION and node.name != "main"
                wrong += [f"{name}:{node.lineno} {node.name}"] * (wide or long)
    assert not wrong


def test_the_three_loops_are_one():
    """What train.py's loop does with steps, rates, time and state, the other two do, too."""
    loops = {name: source.partition("\n    stop, seconds")[2] for name, source, _ in files()}
    words = "interval state share seconds optimizer usable clip_grad stopping".split()
    for line in loops["train.py"].replace("is_better", "train.is_better").split("\n"):
        ruled = any(word in line for word in words) and "#" not in line
        assert not ruled or line in loops["distill.py"], line
        assert not ruled or line.replace("train.is", "is") in loops["vision.py"], line


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_arrows_point_one_way():
    """No circle, and nothing in lib/ or data/ that imports a script other than model.py."""
    trees = {name[:-3].replace("/", "."): tree for name, _, tree in files()}
    trees = {name: tree for name, tree in trees.items() if not name.startswith("tests")}
    graph = {name: set(imported(tree)) & trees.keys() for name, tree in trees.items()}
    scripts = {name for name in graph if "." not in name} - {"model"}
    assert not [(name, to & scripts) for name, to in graph.items() if "." in name and to & scripts]
    while leaves := [name for name, to in graph.items() if not to & graph.keys()]:
        graph = {name: to for name, to in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_ruff_finds_nothing():
    ruff = [sys.executable, "-m", "ruff"]
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([*ruff, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
