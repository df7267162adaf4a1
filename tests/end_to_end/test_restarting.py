"""Ranks that die, mistakes under torchrun, jobs that are requeued: what `docs/running.md` tells to type, typed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ARITHMETIC, TINY, TRAIN, contents, environment, read_lines, run, run_process

pytestmark = pytest.mark.xdist_group("restarting")  # one worker, so that the runs are made once

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SHORT = (*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=14", "checkpoint_every=4", "eval_every=5", "out_dir=run")

# Training as it is, but for one rank that comes to grief in its sixth step, the first time it is started.
TROUBLE = """
import os, signal
from simcot_latent import cli, train
from simcot_latent.train import Trainer

train_step, first = Trainer.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def troubled(self, prepared):
    if first and self.step == 5 and os.environ["RANK"] == "1":
        {trouble}
    return train_step(self, prepared)

Trainer.train_step = troubled
cli.run(train.main, "train")
"""


# Training as it is, which then says what threads it has left behind.
THREADS = """
import os
from pathlib import Path
from simcot_latent import cli, train

try:
    cli.run(train.main, "train")
finally:
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in others]
    Path("threads-" + os.environ["RANK"]).write_text(" ".join(names))
"""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that nothing interrupted."""
    folder = tmp_path_factory.mktemp("once")
    run_process(*LAUNCHER, "-m", TRAIN, *SHORT, folder=folder).ok()
    return folder / "run"


def assert_same_run(ours: Path, theirs: Path) -> None:
    mine, other = contents((ours / "latest").resolve()), contents((theirs / "latest").resolve())
    assert mine.keys() == other.keys()
    assert [n for n in mine if n not in ("config.json", "manifest.json") and mine[n] != other[n]] == []
    clock = ("tokens_per_s", "data_wait")
    lines = [
        [{k: v for k, v in line.items() if k not in clock} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (ours, theirs)
    ]
    assert lines[0] == lines[1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed in /proc, which Linux has")
@pytest.mark.parametrize("mode", [pytest.param("weighted", marks=pytest.mark.slow), "latent"])
def test_no_thread_of_gloo_outlives_training(mode: str, tmp_path: Path) -> None:
    """One that lets go of a tensor while Python shuts down aborts a rank whose training succeeded."""
    (tmp_path / "program.py").write_text(THREADS)
    options = [*TINY, *ARITHMETIC, f"mode={mode}", "num_iterations=2", "out_dir=run"]
    run_process(*LAUNCHER, "program.py", *options, folder=tmp_path).ok()
    # A file per rank: lines that two ranks print at once may run into one another.
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == [""] * 2


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(once: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TROUBLE.format(trouble="os.kill(os.getpid(), signal.SIGKILL)"))
    began = time.monotonic()
    command = (*LAUNCHER, "--max-restarts=1", "program.py", *SHORT, "resume=auto")
    outcome = run_process(*command, folder=tmp_path).ok()
    assert time.monotonic() - began < 90  # two starts, 14 small steps and nobody who waits
    assert outcome.out.count("going on from") == 1
    assert_same_run(tmp_path / "run", once)
    assert not (tmp_path / "run/lock.json").exists()


@pytest.mark.slow
def test_the_first_traceback_is_that_of_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TROUBLE.format(trouble="raise ZeroDivisionError('the first of all')"))
    began = time.monotonic()
    outcome = run_process(*LAUNCHER, "program.py", *SHORT, folder=tmp_path)
    assert outcome.status == 1
    assert time.monotonic() - began < 90
    errors = re.findall(r"^(?:\[rank\d\]: *)?(\w+(?:\.\w+)*(?:Error|Exception)\b.*)$", outcome.err, re.MULTILINE)
    assert errors[0] == "ZeroDivisionError: the first of all"


@pytest.mark.parametrize(
    ("mistake", "named"),
    [("tokenizer.ranks=nowhere", "nowhere"), ("learning_rat=1", "learning_rat")]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("learning_rate=-1", "learning_rate=-1"), ("eval_examples=1", "ranks"),
        ("out_dir=" + "x" * 300, "File name too long"))],
)  # fmt: skip
def test_a_mistake_is_told_once(mistake: str, named: str, tmp_path: Path) -> None:
    """By whichever rank comes to it first: before the ranks know of each other, when they do, or on rank 0 alone."""
    outcome = run_process(*LAUNCHER, "-m", TRAIN, *SHORT, *mistake.split(), folder=tmp_path)
    assert outcome.status == 1  # torchrun's own
    told = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert named in told[0]
    assert outcome.err.count("Traceback") == 1  # torchrun's own too
    assert re.search(r"exitcode\s*:\s*2\b", outcome.err)
    assert not any(tmp_path.iterdir())


def test_a_disk_that_is_full_ends_all_ranks_with_one_line(once: Path, tmp_path: Path) -> None:
    """Files may not be larger than 1 kB here, which is less than the metrics."""
    program = "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    (tmp_path / "program.py").write_text(f"{program}runpy.run_module({TRAIN!r}, run_name='__main__', alter_sys=True)\n")
    outcome = run_process(*LAUNCHER, "program.py", *SHORT, folder=tmp_path)
    assert outcome.status == 1
    told = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "File too large" in told[0]


@pytest.mark.slow
def test_sigusr1_under_torchrun_ends_all_ranks_with_success(once: Path, tmp_path: Path) -> None:
    """torchrun would start ranks again that end with anything else."""
    (tmp_path / "program.py").write_text(TROUBLE.format(trouble="os.kill(os.getpid(), signal.SIGUSR1)"))
    command = (*LAUNCHER, "--max-restarts=3", "program.py", *SHORT, "resume=auto")
    outcome = run_process(*command, folder=tmp_path).ok()
    assert outcome.out.count("stopped by a signal, SIGUSR1,") == 1
    assert "going on from" not in outcome.out
    run_process(*LAUNCHER, "-m", TRAIN, *SHORT, "resume=auto", folder=tmp_path).ok()
    assert_same_run(tmp_path / "run", once)


SLURM = re.compile(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_script_for_slurm(tmp_path: Path) -> None:
    """The one of `docs/running.md`, run as Slurm would: a notice before the time is over, then the job once more."""
    page = (Path(__file__).parents[2] / "docs/running.md").read_text(encoding="utf-8")
    (script,) = SLURM.findall(page)
    arguments = [*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=60", "checkpoint_every=-1"]
    script = script.replace("mode=latent", " ".join(arguments)).replace("python -m", f"{sys.executable} -m")
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (tmp_path / "bin/scontrol").chmod(0o755)
    env = environment({"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"})
    with subprocess.Popen(
        ["bash", "job.sh"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, pipesize=4096
    ) as job:
        assert job.stdout is not None
        while not (line := job.stdout.readline()).startswith("step 00003"):
            assert line
        job.send_signal(signal.SIGUSR1)
        rest = job.stdout.read()
    assert "stopped by a signal, SIGUSR1," in rest
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert "60 steps" in done.stdout or "steps in" in done.stdout
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"  # done, so not again
    steps = [line["step"] for line in read_lines(tmp_path / "runs/latent/metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_two_runs_that_begin_at_once_take_two_folders(tmp_path: Path) -> None:
    """Neither was given an `out_dir`."""
    arguments = (*TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1")
    processes = [
        subprocess.Popen([sys.executable, "-m", TRAIN, *arguments], cwd=tmp_path, env=environment(),
                         stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]  # fmt: skip
    assert [process.wait(120) for process in processes] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["weighted", "weighted-2"]
    assert run(TRAIN, *arguments, "out_dir=runs/weighted", "resume=auto", folder=tmp_path).ok().status == 0
