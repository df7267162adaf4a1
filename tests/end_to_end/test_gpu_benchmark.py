"""python -m benchmarks.gpu, as far as a machine without a GPU can tell."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, Trained, environment, run, strict_json
from torch import nn

from benchmarks.common import SIZES
from benchmarks.gpu.__main__ import PARTS, Part, run_parts
from benchmarks.gpu.common import Report, read_report, relative_error, slug
from benchmarks.gpu.correct import FAMILIES, compare, make_method, numbers
from benchmarks.gpu.profile import Span, busy_seconds, dearest, longest_gaps
from benchmarks.gpu.train import transformer_flops
from simcot_latent.config import as_plain, config_dir
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.model.gpt import GPT, GPTConfig

# What a bare machine lacks: an import of any of these ends the part.
ABSENT = ("hydra", "omegaconf", "datasets", "wandb", "pytest", "gguf")

BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}, as on a bare machine", name=name)

sys.meta_path.insert(0, Absent())
"""


def benchmark(*arguments: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", "out", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(env), capture_output=True, text=True, timeout=560)


@pytest.mark.slow
@pytest.mark.timeout(600)  # two minutes on two cores that have nothing else to do
def test_every_part_runs(tmp_path: Path) -> None:
    done = benchmark(folder=tmp_path)
    reports = {name: strict_json((tmp_path / "out" / f"{name}.json").read_text()) for name in PARTS}
    logs = "".join((tmp_path / "out" / f"{name}.log").read_text()[-2000:] for name in PARTS)
    assert done.returncode == 0, done.stdout + logs
    for name, report in reports.items():
        assert report["state"] == "done"
        assert report["rows"], name
        assert report["machine"]["card"]
        assert report["versions"]["torch"] == torch.__version__
        assert report["commit"]
        for headline in report["headlines"]:
            assert headline.split()[0] in done.stdout
    checks = {row["check"]: row for row in reports["correct"]["rows"]}
    assert all(row["ok"] for row in checks.values())
    assert checks["answers at batch 1, 7, 64"]["answers"] == 64
    assert checks["golden curve, latent"]["steps"] == 30
    for row in reports["train"]["rows"]:
        assert row["ratio"] == row["ours_s"] / row["bound_s"]
        assert 0 < row["mfu_measured"] < 1
        assert 0 < row["busy"] <= 1
    assert {row["way"] for row in reports["generate"]["rows"]} == {"latent", "written"}
    assert reports["learn"]["left_out"] == [{"what": "SmolLM2-135M on GSM8K", "why": "give --weights and --gsm8k"}]
    assert {row["kind"] for row in reports["profile"]["rows"]} == {"kernel", "gap", "part"}
    assert (tmp_path / "out" / "profile_trace.json.gz").stat().st_size > 1000


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_costs_only_itself(tmp_path: Path) -> None:
    """What a hanging part has started is ended with it, and what it has reported is kept."""
    programs = {
        "crashes": "raise RuntimeError('the card fell out')",
        "hangs": "import subprocess, sys, time\n"
        "from argparse import Namespace\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu.common import Report\n"
        "out = Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "Report('hangs', Namespace(out=out, seconds=9, device='cpu', commit='abc')).add(found=7)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(out / 'child').write_text(str(child.pid))\n"
        "time.sleep(600)\n",
        "works": "print('well')",
    }
    parts = {}
    for name, program in programs.items():
        (tmp_path / f"part_{name}.py").write_text(program)
        parts[name] = Part(f"part_{name}", share=1.0, most=25.0, what="a test")
    out = tmp_path / "out"
    out.mkdir()
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(REPOSITORY))))
        states = run_parts(parts, seconds=60, out=out, options=[])
    assert time.monotonic() - began < 60
    assert states["crashes"] == "failed (status 1: RuntimeError: the card fell out)"
    assert states["hangs"].startswith("stopped after ")
    assert states["works"] == "done"
    kept = read_report(out, "hangs")
    assert (kept["state"], kept["rows"]) == (states["hangs"], [{"found": 7}])
    assert not is_running(int((out / "child").read_text()))


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


@pytest.mark.parametrize(
    "part", ["train", *(pytest.param(part, marks=pytest.mark.slow) for part in ("correct", "generate", "profile"))]
)
def test_a_bare_machine_will_do(part: str, tmp_path: Path) -> None:
    """Nothing is imported that `docs/speed.md` does not list; `correct` says in one line that pytest is missing."""
    (tmp_path / "sitecustomize.py").write_text(BARE.format(absent=set(ABSENT)))
    program = f"import benchmarks.gpu.{part}, sys; print(sorted(sys.modules.keys() & {set(ABSENT)!r}))"
    env = environment({"PYTHONPATH": os.pathsep.join((str(tmp_path), str(REPOSITORY)))})
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_card_is_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    command = [sys.executable, "-m", "benchmarks.gpu.profile", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: --device=cuda: this machine has 0 CUDA devices; use device=cpu or device=auto\n"


def test_a_wrong_gradient_is_found() -> None:
    """A check that cannot fail would be worth nothing."""
    problems = Arithmetic(train_size=16).load("train").problems
    expected = numbers(make_method(FAMILIES["llama"], 3), problems, torch.device("cpu"))
    assert compare(expected, expected)["ok"]
    for name in ("loss", "model.transformer.blocks.0.attention.qkv.weight", "step_decoder.transformer.norm.weight"):
        wrong = expected | {name: expected[name] * 1.001}
        assert not compare(wrong, expected)["ok"]
        assert compare(wrong, expected)["worst"] == name
        assert not compare(expected | {name: expected[name] * float("nan")}, expected)["ok"]
    assert not compare({key: x for key, x in expected.items() if "qkv" not in key}, expected)["ok"]


def test_relative_error() -> None:
    one, other = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.4])
    assert relative_error(other, one) == pytest.approx(0.1)
    assert relative_error(other, one, floor=8.0) == pytest.approx(0.05)


def test_flops_of_a_transformer() -> None:
    """Against a count of every product's multiplications, forward: a third of forward and backward."""
    config = GPTConfig(vocab_size=8, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_width=48, activation="swiglu")
    transformer = GPT(config).transformer
    linear = sum(2 * m.in_features * m.out_features for m in transformer.modules() if isinstance(m, nn.Linear))
    lengths = [5, 2]
    attention = sum(2 * 2 * 8 * 4 * 3 * (t + 1) for length in lengths for t in range(length))  # q k and w v, 3 layers
    assert transformer_flops(transformer, torch.tensor(lengths)) == 3 * (linear * sum(lengths) + attention)


def test_gaps_and_dearest() -> None:
    spans = [Span("a", 0, 10), Span("b", 4, 6), Span("a", 30, 35), Span("c", 36, 40)]
    assert busy_seconds(spans) == pytest.approx(19e-6)
    assert longest_gaps(spans, 2) == [("a", "a", 20), ("a", "c", 1)]
    assert dearest(spans, 2) == [("a", 15, 2), ("c", 4, 1)]


def test_a_report_is_whole_after_every_row(tmp_path: Path) -> None:
    args = argparse.Namespace(out=tmp_path, seconds=10.0, device="cpu", commit="abc")
    report = Report("part", args, data="none")
    report.add(x=1)
    assert json.loads((tmp_path / "part.json").read_text())["rows"] == [{"x": 1}]
    report.leave_out("y", "no time left")
    found = read_report(tmp_path, "part")
    assert found["left_out"] == [{"what": "y", "why": "no time left"}]
    assert (found["state"], found["commit"], found["data"]) == ("running", "abc", "none")


def test_names() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


def test_g_is_the_preset() -> None:
    from omegaconf import OmegaConf

    preset = as_plain(OmegaConf.load(config_dir() / "model" / "gpt2.yaml"))
    assert GPTConfig(vocab_size=50257, **preset) == SIZES["G"]


def test_learning_from_weights_at_hand(weighted_run: Trained, sums: Path, tmp_path: Path) -> None:
    """Written steps, then thoughts with and without step loss from them, each scored on the whole test set."""
    arguments = (
        "--device",
        "cpu",
        "--tiny",
        "--out",
        "out",
        "--weights",
        str(weighted_run.latest),
        "--gsm8k",
        str(sums),
    )
    run("benchmarks.gpu.learn", *arguments, folder=tmp_path).ok()
    report = read_report(tmp_path / "out", "learn")
    rows = {row["run"]: row for row in report["rows"]}
    assert list(rows) == ["quick start", "written", "simcot", "coconut"]
    assert report["left_out"] == []
    for name, mode in (("written", "weighted"), ("simcot", "latent"), ("coconut", "latent")):
        assert (rows[name]["mode"], rows[name]["steps"], rows[name]["problems"]) == (mode, 2, 8)
        assert rows[name]["n"] == len(GSM8K(path=str(sums)).load("test").problems[:16])
    assert rows["coconut"]["validation"]["val_loss"] == rows["coconut"]["validation"]["val_answer_loss"]
    assert rows["simcot"]["validation"]["val_loss"] > rows["simcot"]["validation"]["val_answer_loss"]
