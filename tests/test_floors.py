"""How the package is built: imports go down, in no circle; every module can be imported alone; files are short."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "simcot_latent"

FLOORS = (
    "errors text profiling evals",  # of the evals their names alone; the commands are in evals/ beside the package
    "files parts distributed",
    "config",
    "paths",
    "folders logs",
    "data model",  # so data knows nothing of models, and model nothing of problems or tokenizers
    "metrics weights",
    "loops curricula",
    "terms",
    "batches",
    "method",
    "checkpoint_folders hub",
    "checkpoint_config reports",
    "checkpoint_parts",
    "checkpoint",
    "generate cli",
    "probing interop",
    "training",
    "train evaluate probe export import_checkpoint data.train_tokenizer",
    "commands",
    "simcot_latent",  # the public names
)
"""Modules and folders, the lowest floor first. A module may import what is on a lower floor, and what is in its folder.

A new file in a folder that is named here needs no entry; any other needs one, on the lowest floor that it can stand on.
"""

EXCEPTIONS = {
    ("terms.step_decoder", "checkpoint"): "StepDecoder.from_checkpoint is documented; it imports when it is called",
}
"""Imports that go up, and why they may."""

MOST_LINES = 400
MOST_LINES_OF_THE_LOOP = 350  # train.py
LONG_FILES = {
    "config.py": "every key of a run, with the docstrings that the options page is made of",
    "data/problem.py": "one grammar of numbers and expressions, for steps and answers alike",
    "data/tokenizer.py": "one class: an encoding with its roles, its spans of text and its files",
    "model/cache.py": "the caches of keys and values, growing and static, which share their attention",
    "model/linear.py": "layers and tables whose weights gather their gradients over the passes of a step",
    "model/gpt.py": "one transformer for all families, to be read from top to bottom",
}
"""Files that are longer since they are one idea, and which."""

Graph = Mapping[str, Iterable[str]]
"""What each module imports, by names without `simcot_latent.`"""


def modules() -> dict[str, Path]:
    """The files of the package by module."""
    names = {path.relative_to(PACKAGE).with_suffix(""): path for path in sorted(PACKAGE.rglob("*.py"))}
    dotted = {".".join(name.parts).removesuffix("__init__").removesuffix("."): path for name, path in names.items()}
    return {name or "simcot_latent": path for name, path in dotted.items()}


def imports_in(source: str, known: Iterable[str]) -> set[str]:
    """The modules of the package that a file imports wherever in it, but for those that only type checkers see."""
    found: set[str] = set()
    for node in run_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("simcot_latent.") in known else node.module or "")
    ours = {name for name in found if name.split(".")[0] == "simcot_latent"}
    return {name.removeprefix("simcot_latent.") for name in ours}


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below one, without what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).removeprefix("typing.") == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from run_nodes(other)
            continue
        yield child
        yield from run_nodes(child)


def package_graph() -> dict[str, set[str]]:
    files = modules()
    return {name: imports_in(path.read_text(encoding="utf-8"), files) for name, path in files.items()}


def without(graph: Graph, exceptions: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    return {name: {other for other in others if (name, other) not in exceptions} for name, others in graph.items()}


def place(module: str) -> tuple[int, str] | None:
    """The floor of a module and the entry that it stands under: the longest that names it or a folder around it."""
    entries = {entry: floor for floor, names in enumerate(FLOORS) for entry in names.split()}
    found = [entry for entry in entries if module == entry or module.startswith(f"{entry}.")]
    return max((len(entry), entries[entry], entry) for entry in found)[1:] if found else None


def upward(graph: Graph) -> list[str]:
    """The imports that do not go down."""
    wrong: list[str] = []
    for name, others in graph.items():
        for other in others:
            above, below = place(name), place(other)
            if above and below and not (below[0] < above[0] or below == above):
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def circle(graph: Graph) -> list[str]:
    """Modules that import one another in a circle; none if there is none."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for other in sorted(graph.get(path[-1], ())):
            if other in path:
                return path[path.index(other) :]
            if other not in finished and (found := search([*path, other])):
                return found
        finished.add(path[-1])
        return []

    return next((found for name in sorted(graph) if name not in finished and (found := search([name]))), [])


# --- the package -----------------------------------------------------------------------------------------------------


def test_every_module_has_its_floor() -> None:
    assert [name for name in modules() if place(name) is None] == []


def test_imports_go_down() -> None:
    assert upward(without(package_graph(), EXCEPTIONS)) == []


def test_there_is_no_circle() -> None:
    assert circle(without(package_graph(), EXCEPTIONS)) == []


def test_exceptions_are_needed() -> None:
    wrong = upward(package_graph())
    assert [pair for pair in EXCEPTIONS if f"{pair[0]} imports {pair[1]}" not in wrong] == []


def test_every_module_can_be_imported_alone() -> None:
    """In one process, as loading torch takes seconds: what is ours is forgotten before each import."""
    program = """
import importlib, json, sys
failed = {}
for name in json.loads(sys.argv[1]):
    for loaded in [module for module in sys.modules if module.split(".")[0] == "simcot_latent"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""
    names = [name if name == "simcot_latent" else f"simcot_latent.{name}" for name in modules()]
    command = [sys.executable, "-c", program, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def test_no_file_is_long_that_is_not_one_idea() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    assert {file: lines for file, lines in lengths.items() if lines > MOST_LINES and file not in LONG_FILES} == {}
    assert LONG_FILES.keys() <= lengths.keys()
    assert lengths["train.py"] < MOST_LINES_OF_THE_LOOP


# --- that all of it would be noticed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import simcot_latent.checkpoint", {"checkpoint"}),
        ("from simcot_latent import cli, sources", {"cli", "simcot_latent"}),
        ("from simcot_latent.data import problem", {"data.problem"}),
        ("from simcot_latent.data.problem import Problem as P", {"data.problem"}),
        ("def f():\n    if True:\n        from simcot_latent.generate import answer", {"generate"}),
        ("class A:\n    def f(self):\n        import simcot_latent as sl", {"simcot_latent"}),
        ("if TYPE_CHECKING:\n    import simcot_latent.cli\nelse:\n    import simcot_latent.logs", {"logs"}),
        ("if typing.TYPE_CHECKING:\n    import simcot_latent.cli", set()),
        ("if not TYPE_CHECKING:\n    import simcot_latent.cli", {"cli"}),
        ("import torch, simcot_latent_other\nfrom torch import nn", set()),
    ],
)
def test_imports_of_every_kind_are_seen(source: str, imported: set[str]) -> None:
    known = ["checkpoint", "cli", "logs", "generate", "data", "data.problem", "simcot_latent"]
    assert imports_in(source, known) == imported


@pytest.mark.parametrize(
    ("module", "other", "goes_up"),
    [
        ("model.gpt", "data.problem", True),
        ("data.batch", "model.gpt", True),
        ("generate", "interop.pretrained", True),
        ("loops.pause", "terms.base", True),
        ("loops.pause", "curricula.base", True),
        ("errors", "simcot_latent", True),
        ("evaluate", "train", True),
        ("data.batch", "data.train_tokenizer", True),
        ("data.train_tokenizer", "data.sources.arithmetic", False),
        ("loops.pause", "loops.base", False),
        ("loops.pause", "model.gpt", False),
        ("checkpoint", "loops", False),
        ("training.setup", "interop.pretrained", False),
    ],
)
def test_imports_that_go_up_are_noticed(module: str, other: str, goes_up: bool) -> None:
    assert upward({module: [other]}) == ([f"{module} imports {other}"] if goes_up else [])


def test_circles_are_noticed() -> None:
    assert circle({"a": ["b"], "b": ["c", "d"], "c": ["b"], "d": []}) == ["b", "c"]
    assert circle({"a": ["a"]}) == ["a"]
    assert circle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
