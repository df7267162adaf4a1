"""The installed commands, as pip makes them: what they run, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import REPOSITORY, Outcome, Trained, environment, report_in, run_process, strict_json

from simcot_latent import commands
from simcot_latent.config import CHOICES
from simcot_latent.data.sources import SPLITS
from simcot_latent.interop.exported import DTYPES
from simcot_latent.interop.imported import KINDS

SCRIPTS = dict(
    re.findall(r'^(simcot-\w+) = "simcot_latent.commands:(\w+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
)


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, str]:
    """An environment in whose PATH the commands are, as pip writes them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, function in SCRIPTS.items():
        file = folder / name
        file.write_text(f"#!{sys.executable}\nfrom simcot_latent.commands import {function}\n{function}()\n")
        file.chmod(0o755)
    return environment({"PATH": f"{folder}:{os.environ['PATH']}"})


def call(command: list[str], scripts: dict[str, str], folder: Path) -> Outcome:
    done = subprocess.run(command, cwd=folder, env=scripts, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_each_runs_its_module(scripts: dict[str, str], latent_run: Trained, tmp_path: Path) -> None:
    assert len(SCRIPTS) == 5
    ckpt = f"ckpt={latent_run.latest}"
    call(["simcot-eval", "gsm8k", ckpt, "limit=2", "device=cpu", "out=results"], scripts, tmp_path).ok()
    assert strict_json(report_in(tmp_path / "results").read_text())["eval"] == "gsm8k"
    assert "decoded step" in call(["simcot-probe", ckpt, "question=How many, is it?"], scripts, tmp_path).ok().out
    assert "ckpt is missing" in call(["simcot-export"], scripts, tmp_path).error
    assert "source is missing" in call(["simcot-import"], scripts, tmp_path).error
    assert "did you mean latent?" in call(["simcot-train", "mode=lattent"], scripts, tmp_path).error
    message = call(["simcot-eval", "gsm8", ckpt], scripts, tmp_path).error
    assert "gsm8: is no eval; give one of arithmetic, " in message
    assert message.endswith("did you mean gsm8k?")
    assert "which eval?" in call(["simcot-eval"], scripts, tmp_path).error


def test_the_name_of_an_eval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        monkeypatch.setattr(sys, "argv", ["simcot-eval", flag])
        commands.evaluate()  # exit status 0
        printed = capsys.readouterr()
        assert printed.out.startswith("usage: simcot-eval NAME ckpt=DIR")
        assert "arithmetic, gsm8k, gsm8k_aug" in printed.out
        assert printed.err == ""
    for arguments, says in {
        ("ckpt=x", "arithmetic"): "error: arithmetic: the name of the eval comes first, as in `simcot-eval arithmetic ",
        ("ckpt=x",): "error: which eval? give one of arithmetic, gsm8k, gsm8k_aug first",
        ("gsm9k", "ckpt=x"): "error: gsm9k: is no eval; give one of arithmetic, gsm8k, gsm8k_aug first",
    }.items():
        monkeypatch.setattr(sys, "argv", ["simcot-eval", *arguments])
        with pytest.raises(SystemExit) as stop:
            commands.evaluate()
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(says)


COMPLETED = {
    "simcot-train mo": {"mode=", "model=", "model."},
    "simcot-train mode=": {"mode=latent", "mode=weighted"},
    "simcot-train mode=latent latent.n_l": {"latent.n_latents="},
    "simcot-train out": {"out_dir="},
    "simcot-eval ": {"arithmetic", "gsm8k", "gsm8k_aug"},
    "simcot-eval gs": {"gsm8k", "gsm8k_aug"},
    "simcot-eval gsm8k li": {"limit="},
    "simcot-eval arithmetic data.max_r": {"data.max_result="},
    "simcot-probe for": {"format="},
    "simcot-export max": {"max_shard_gb="},
    "simcot-import kin": {"kind="},
    "simcot-train latent.missing=": {"latent.missing=mask", "latent.missing=answer"},
    "simcot-eval gsm8k dtype=b": {"dtype=bfloat16"},
}


def test_bash_completes_their_arguments(scripts: dict[str, str], tmp_path: Path) -> None:
    """What the line in `docs/running.md` defines is called as bash calls it when somebody presses TAB."""
    page = (REPOSITORY / "docs/running.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^for c in .*simcot-train.*-sc install=bash.*$", page, re.M)
    ask = "".join(
        f"COMP_LINE={typed!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE); COMPREPLY=()\n"
        f"COMP_CWORD={len(typed.split()) - 1 + typed.endswith(' ')}\n"
        f"f=$(complete -p {typed.split()[0]} | sed 's/.*-F \\([^ ]*\\).*/\\1/'); $f; echo \"${{COMPREPLY[*]}}\"\n"
        for typed in COMPLETED
    )
    outcome = call(["bash", "-c", f"{line}\n{ask}"], scripts, tmp_path)
    assert outcome.err == ""
    found = [set(words.split()) for words in outcome.out.splitlines()]
    assert dict(zip(COMPLETED, found, strict=True)) == COMPLETED


VALUES = {
    ("train", "dtype="): {"dtype=auto", "dtype=float32", "dtype=bfloat16"},
    ("train", "mode=latent dtype=b"): {"dtype=bfloat16"},
    ("train", "resume="): {"resume=true", "resume=false", "resume=auto"},
    ("train", "device=c"): {"device=cpu", "device=cuda"},
    ("train", "on_nonfinite="): {"on_nonfinite=error", "on_nonfinite=skip"},
    ("train", "latent.reset_optimizer="): {"latent.reset_optimizer=true", "latent.reset_optimizer=false"},
    ("train", "compile="): {"compile=true", "compile=false"},
    ("train", "seed="): {"seed=0"},
    ("train", "dtype=x"): {""},
    ("eval", "split="): {"split=train", "split=validation", "split=test"},
    ("probe", "format="): {"format=table", "format=json"},
    ("export", "verify=f"): {"verify=false"},
    ("import", "kind=simcot"): {"kind=simcot_coconut", "kind=simcot_codi"},
}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_values_are_completed(shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of keys that have few; whether a word is begun or not."""
    for (command, typed), completed in VALUES.items():
        monkeypatch.setattr(sys, "argv", [f"simcot-{command}", "-sc", f"query={shell}"])
        monkeypatch.setenv("COMP_LINE", f"simcot-{command} {'gsm8k ' if command == 'eval' else ''}{typed}")
        {"train": commands.train, "eval": commands.evaluate, "probe": commands.probe, "export": commands.export,
         "import": commands.import_}[command]()  # fmt: skip
        out = capsys.readouterr().out
        assert set(out.rstrip("\n").split("\n" if shell == "fish" else " ")) == completed, typed


def test_a_shell_does_not_wait_for_torch() -> None:
    program = "import sys; from simcot_latent import commands; print('torch' in sys.modules)"
    assert run_process("-c", program, folder=REPOSITORY).ok().out == "False\n"


def test_what_is_completed_is_what_is_accepted() -> None:
    """Where the choices stand twice, as names are looked up that stand above, or take seconds to import."""
    assert CHOICES["eval"]["split"] == CHOICES["probe"]["split"] == SPLITS
    assert CHOICES["import"]["kind"] == tuple(KINDS)
    assert CHOICES["export"]["dtype"] == tuple(DTYPES)


@pytest.mark.slow
def test_evals_have_two_names_in_a_checkout(latent_run: Trained, tmp_path: Path) -> None:
    """And one of them is ours alone: whoever has a package `evals` of his own can use the other."""
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals/__init__.py").write_text("raise ImportError('somebody else\\'s')")
    arguments = (f"ckpt={latent_run.latest}", "limit=1", "device=cpu", f"out={tmp_path}/results")
    run_process("-m", "simcot_latent.evals.gsm8k", *arguments, folder=tmp_path).ok()
    assert "somebody else's" in run_process("-m", "evals.gsm8k", *arguments, folder=tmp_path).err
    run_process("-m", "evals.gsm8k", *arguments, folder=REPOSITORY).ok()
    which = "from simcot_latent.evals import module_of; print(module_of('gsm8k'))"
    assert run_process("-c", which, folder=REPOSITORY).ok().out == "evals.gsm8k\n"
    assert run_process("-c", which, folder=tmp_path).ok().out == "simcot_latent.evals.gsm8k\n"
