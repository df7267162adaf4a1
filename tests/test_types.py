"""What a user's type checker sees of the package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from documents import REPOSITORY, blocks

import simcot_latent as sl

pytest.importorskip("pyright")

RIGHT = """
import torch
import simcot_latent as sl

checkpoint: sl.Checkpoint = sl.load_checkpoint("runs/latent", device="cpu")
model: sl.GPT = checkpoint.model
decoder: sl.StepDecoder | None = checkpoint.step_decoder
questions = ["What is 1+1?"]
thoughts: sl.Thoughts = sl.think(checkpoint, questions)
latents: torch.Tensor = thoughts.latents
answers_like: sl.AnswerFormat = checkpoint.answers
loop: sl.ThoughtLoop | None = checkpoint.loop
stage: sl.Stage = checkpoint.stage
groups: sl.StepGroups = checkpoint.groups
print(answers_like.question_end.strip(), stage.thoughts + 1, groups.latents_per_step + checkpoint.n_groups)
steps: list[list[str]] = sl.decode_steps(checkpoint, latents + 0.1)
answers: list[str] = sl.answer(checkpoint, questions, max_new_tokens=8)
for probe in sl.probe_questions(checkpoint, questions):
    print([group.decoded.strip() for group in probe.groups], probe.answer.strip())
config = sl.GPTConfig(vocab_size=64)
print(config.n_embd + 1, sl.GPT(config).config.head_width + 1, sl.__version__.split("."))

@sl.register("loop", "noisy")
class Noisy(sl.ThoughtLoop): ...

print(Noisy.Config, checkpoint.loop.key.strip() if checkpoint.loop is not None else "")
try:
    sl.load_pretrained("gpt2")
except sl.UserError as error:
    print(error)
"""

# Each line with the rule that it breaks; `checkpoint` is declared before.
WRONG = {
    "sl.nonsense": "reportAttributeAccessIssue",
    "sl.ThoughtFormat": "reportAttributeAccessIssue",
    "checkpoint.thoughts": "reportAttributeAccessIssue",
    "sl.Stage(thoughts='4')": "reportArgumentType",
    "sl.load_checkpoint('runs/latent', devise='cpu')": "reportCallIssue",
    "sl.answer(checkpoint, 3)": "reportArgumentType",
    "sl.think(checkpoint, ['?']).latent": "reportAttributeAccessIssue",
    "checkpoint.modle": "reportAttributeAccessIssue",
    "sl.GPTConfig(vocab_size='64')": "reportArgumentType",
    "steps: list[str] = sl.decode_steps(checkpoint, sl.think(checkpoint, ['?']))": "reportAssignmentType",
}


def pyright(*arguments: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "pyright", "--outputjson", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stdout)


def test_a_users_type_checker_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """In strict mode, where a type that is not known is an error too."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(REPOSITORY)], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "right.py").write_text(RIGHT)
    (readme,) = blocks(REPOSITORY / "README.md", "python")
    (tmp_path / "readme.py").write_text(readme)
    head = "import simcot_latent as sl\ncheckpoint = sl.load_checkpoint('x')\n"
    (tmp_path / "wrong.py").write_text(
        head + "".join(f"print({line})\n" if " = " not in line else f"{line}\n" for line in WRONG)
    )
    report = pyright("--project", tmp_path, "--pythonpath", sys.executable)
    assert report["summary"]["filesAnalyzed"] == 3
    found: dict[str, list[tuple[int, str, str]]] = {}
    for error in report["generalDiagnostics"]:
        where = (error["range"]["start"]["line"] - 1, error.get("rule", ""), error["message"])
        found.setdefault(Path(error["file"]).name, []).append(where)
    assert {file: errors for file, errors in found.items() if file != "wrong.py"} == {}
    rules = dict.fromkeys(WRONG, "")
    for line, rule, _ in found["wrong.py"]:
        if not rule.startswith("reportUnknown"):  # which follow from the error itself
            rules[list(WRONG)[line - 1]] = rule
    assert rules == WRONG


def test_every_type_is_known() -> None:
    """Of all functions, classes and attributes of all modules; pyright reads a typed package by its annotations."""
    report = pyright("--verifytypes", "simcot_latent", "--ignoreexternal")["typeCompleteness"]
    assert Path(report["pyTypedPath"]) == REPOSITORY / "simcot_latent/py.typed"
    assert report["exportedSymbolCounts"]["withKnownType"] > 1000
    unknown = [
        diagnostic["message"]
        for symbol in report["symbols"]
        for diagnostic in symbol["diagnostics"]
        if re.search(r"annotation is missing|[Tt]ype unknown", diagnostic["message"])
    ]
    assert unknown == []
    assert report["exportedSymbolCounts"]["withUnknownType"] == report["otherSymbolCounts"]["withUnknownType"] == 0


def test_public_names_are_the_same_for_python_and_type_checkers() -> None:
    tree = ast.parse((REPOSITORY / "simcot_latent/__init__.py").read_text(encoding="utf-8"))
    (checked,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(declared) == sorted(sl.__all__)
    for name, module in declared.items():
        assert getattr(sl, name) is getattr(sys.modules[str(module)], name)
    assert sl.__version__ == version("simcot-latent")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sl.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_of_an_earlier_version_tells_what_became_of_it() -> None:
    with pytest.raises(AttributeError) as caught:
        sl.ThoughtFormat  # type: ignore[attr-defined]  # noqa: B018
    assert str(caught.value) == (
        "simcot_latent.ThoughtFormat is AnswerFormat (texts), Stage (how many thoughts) and StepGroups (thoughts per "
        "step) now"
    )
    assert {"AnswerFormat", "Stage", "StepGroups"} <= set(sl.__all__)
    assert not hasattr(sl, "ThoughtFormat")
