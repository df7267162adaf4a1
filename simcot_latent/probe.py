"""python -m simcot_latent.probe ckpt=DIR question="..."   (or data=... limit=N): what each thought decodes to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.config import require_choices, require_tolerance, typed
from simcot_latent.distributed import autocast, pick_device, pick_dtype
from simcot_latent.errors import UserError, require
from simcot_latent.logs import make_console
from simcot_latent.paths import check_writable, write_text
from simcot_latent.probing.readers import step_reader
from simcot_latent.probing.steps import probe_problems, probe_questions
from simcot_latent.probing.summary import probe_table, summarise, summary_table
from simcot_latent.text import LONE_SURROGATE

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass
class ProbeConfig:
    """Keys of `configs/probe.yaml`.

    Attributes:
        data: a source of problems to probe; give either this or `question`.
        ckpt: a checkpoint folder, or a run's `out_dir` (its `latest` is taken then); required.
            It must be one of `mode=latent`.
        verify: compare the checkpoint's files with its manifest first.
        question: one question to think about; give either this or `data`.
        split: of `data`: `train`, `validation` or `test`.
        limit: how many problems of `data`.
        batch_size: questions per batch.
        format: `table` or `json`.
        tolerance: how far an answer may be from gold and still count as right, as a share of gold, as in an eval; None:
            as the data state it (`data.tolerance`).
        device: as in training.
        dtype: `auto`, `float32` or `bfloat16`, as in an eval.
        out: a folder for `probe.json`, which holds what `format=json` prints; None: nothing is written.
    """

    data: dict[str, Any] | None = None
    ckpt: str | None = None
    verify: bool = True
    question: str | None = None
    split: str = "test"
    limit: int = 20
    batch_size: int = 32
    format: str = "table"
    tolerance: float | None = None
    device: str = "auto"
    dtype: str = "float32"
    out: str | None = None

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        if (self.question is None) == (self.data is None):
            raise UserError('give either question="..." or data=NAME (with data.path=, limit=)')
        if self.question is not None and (half := LONE_SURROGATE.search(self.question)):
            raise UserError(f"question: its character {half.start() + 1} is U+{ord(half[0]):04X}, which is no text")
        require_choices(self, "probe")
        require_tolerance("tolerance", self.tolerance)
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")


def main(raw: DictConfig) -> None:
    """Probes one question, or problems of a data source."""
    from simcot_latent import cli  # hydra, which probing from Python does without

    config = typed(ProbeConfig, raw)
    tolerance = 0.0
    console = make_console()
    device = pick_device(config.device)
    file = None if config.out is None else Path(config.out) / "probe.json"
    if file is not None:
        check_writable([file], "give another out=DIR")
    checkpoint = load_checkpoint(config.ckpt or "", device, verify=config.verify)
    step_reader(checkpoint)
    dtype = pick_dtype(config.dtype, device, checkpoint.model.config.n_embd)
    with torch.no_grad(), autocast(device, dtype):
        if config.question is not None:
            probes, summary = probe_questions(checkpoint, [config.question]), None
        else:
            quiet = make_console(is_main=config.format == "table")
            problems, source, _ = cli.trained_problems(raw, checkpoint, config.split, config.limit, quiet)  # type: ignore[arg-type]
            tolerance = cli.choose_tolerance(config.tolerance, source)
            probes = probe_problems(checkpoint, problems, config.batch_size, quiet)
            summary = summarise(probes, tolerance)
    text = json.dumps({"probes": [asdict(probe) for probe in probes], "summary": summary}, indent=2)
    if file is not None:
        write_text(file, text + "\n")
    if config.format == "json":
        print(text)
        return
    console.print(probe_table(probes, tolerance))
    if file is not None:
        console.print(f"written to {file}")
    if summary is not None:
        console.print(summary_table(summary))
        low, high = summary["ci95"]
        within = f", within {tolerance:g} of gold" if tolerance else ""
        text = f"{summary['accuracy']:.1%} of {summary['n']} (95% interval {low:.1%} to {high:.1%})"
        console.print(f"answers: {text}{within}")


if __name__ == "__main__":
    from simcot_latent import cli

    cli.run(main, "probe")
