"""Methods on two ranks: the same run as one rank's with twice the accumulation, for presets that have all parts.

All of them are trained under one torchrun, one after the other, which saves the seconds in which it starts. What holds
of mode=weighted and mode=latent stands in test_train.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import ARITHMETIC, TINY, TRAIN, read_lines, run, run_process
from safetensors.torch import load_file

from simcot_latent.parts import PARTS

pytestmark = pytest.mark.xdist_group("ranks")  # one worker, so that all runs are made once

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

SHORT = (*TINY, *ARITHMETIC, "num_iterations=4", "eval_every=-1", "max_new_tokens=4", "target_examples_per_step=7")

# Seven problems per step: the ranks have four and three, in micro-batches of two, and rows lie in another company than
# where one rank has all of them. That matters to CODI's pull as published, which is divided by a standard deviation
# over the micro-batch; so it is left undivided, or micro-batches are of one row.
WARMED = ("latent.warmup=0.3", "latent.stages=0")  # a step written, three with thoughts
METHODS: dict[str, tuple[str, ...]] = {
    "codi": ("method=codi", "latent.n_latents=3", "latent.projector_width=16", "device_batch_size=1"),
    "pccot": ("method=pccot", "latent.n_latents=4", "loss.distill_norm=none", "device_batch_size=2"),
    "kava": ("method=kava", "latent.n_latents=4", "loss.distill_norm=none", "device_batch_size=2"),
    "lotus": (
        "method=lotus", "latent.n_latents=8", "latent.latents_per_step=4", "latent.loops=2", *WARMED,
        "device_batch_size=2",
    ),
    "colar": ("method=colar", "latent.n_latents=8", *WARMED, "device_batch_size=2"),
    "icot": ("method=icot", "num_epochs=1", "latent.removal_smoothing=0.5", "device_batch_size=2"),
    "soft": ("method=soft", "latent.n_latents=3", "latent.warmup=0.2", "latent.stages=0.4", "device_batch_size=2"),
    "mixed": (
        "use=[mixed]", "curriculum=mixed", "--config-dir", "conf", "steps=none", "latent.projector_width=16",
        "device_batch_size=1",
    ),
}  # fmt: skip

# Rows of many stages in each step, so that some micro-batches have no thoughts, and no use for the projector.
MIXED = """
from random import Random

from simcot_latent.curricula.replace import Replace
from simcot_latent.parts import register


@register("curriculum", "mixed")
class Mixed(Replace):
    mixes_stages = True

    def draw_stage(self, progress, seed):
        return self.stage_of(Random(seed).randrange(self.latent.groups + 1))
"""

# Trains by each line of a file, as a command would, in the ranks that torchrun has started. To each it is another
# attempt, for whose ranks to meet.
ALL = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from commands import TRAIN, run

for i, arguments in enumerate(json.loads(Path("runs.json").read_text())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)
    run(TRAIN, *arguments, folder=Path.cwd()).ok()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `two/METHOD` and `one/METHOD`."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "mixed.py").write_text(MIXED)
    (folder / "conf/curriculum").mkdir(parents=True)
    (folder / "conf/curriculum/mixed.yaml").write_text("# @package _global_\ncurriculum: mixed\n")
    (folder / "all.py").write_text(ALL)
    runs = [[*SHORT, *more, f"out_dir=two/{name}"] for name, more in METHODS.items()]
    (folder / "runs.json").write_text(json.dumps(runs))
    run_process(*LAUNCHER, "all.py", str(Path(__file__).parent), folder=folder).ok()
    with pytest.MonkeyPatch.context() as patch:  # what `mixed` registers, no other test finds
        patch.setitem(PARTS, "curriculum", dict(PARTS["curriculum"]))
        for name, more in METHODS.items():
            run(TRAIN, *SHORT, *more, f"out_dir=one/{name}", folder=folder).ok()
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one_with_twice_the_accumulation(name: str, trained: Path) -> None:
    two, one = trained / "two" / name, trained / "one" / name
    files = sorted(file.name for file in (one / "latest").glob("*.safetensors"))
    assert files == sorted(file.name for file in (two / "latest").glob("*.safetensors"))
    for file in files:
        if file == "trainer_state.safetensors":
            continue
        ours, theirs = load_file(two / "latest" / file), load_file(one / "latest" / file)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            error = ((ours[key] - value).norm() / value.norm()).item()
            assert error < 1e-5, f"{file}: {key} differs by {error:.1e}"
    lines = [[line for line in read_lines(folder / "metrics.jsonl") if "loss" in line] for folder in (two, one)]
    assert len(lines[0]) == len(lines[1]) == 4
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key not in ("tokens_per_s", "data_wait", "padding"):
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
