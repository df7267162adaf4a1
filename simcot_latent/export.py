"""python -m simcot_latent.export ckpt=DIR format=hf out=DIR2: see `interop.exported`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from omegaconf import DictConfig

from simcot_latent import cli
from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.config import require_choices, typed
from simcot_latent.errors import UserError, require
from simcot_latent.folders import check_new_folder
from simcot_latent.interop.exported import DTYPES, export_hf, notes
from simcot_latent.logs import make_console


@dataclass
class ExportConfig:
    """Keys of `configs/export.yaml`.

    Attributes:
        ckpt: a checkpoint folder, or a run's `out_dir` (its `latest` is taken then); required.
        verify: compare the checkpoint's files with its manifest first.
        out: the folder to write; new, or empty; required.
        format: `hf`, which `transformers` loads.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        max_shard_gb: weights beyond this size (in 10^9 bytes) go into further files.
    """

    ckpt: str | None = None
    verify: bool = True
    out: str | None = None
    format: str = "hf"
    dtype: str = "float32"
    max_shard_gb: float = 5.0

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise UserError("ckpt is missing; give ckpt=DIR, a folder that training wrote, such as runs/latent/latest")
        if self.out is None:
            raise UserError("out is missing; give out=DIR, the folder to write")
        require_choices(self, "export")
        require(0 < self.max_shard_gb < math.inf, "max_shard_gb", self.max_shard_gb, "above 0, finite")


def main(raw: DictConfig) -> None:
    """Exports one checkpoint."""
    config = typed(ExportConfig, raw)
    console = make_console()
    check_new_folder(config.out or "")
    checkpoint = load_checkpoint(config.ckpt or "", verify=config.verify)
    family = export_hf(checkpoint, config.out or "", DTYPES[config.dtype], config.max_shard_gb)
    console.print(f"{family} | {config.dtype} | {checkpoint.tokenizer} | {config.out}")
    for line in notes(checkpoint, family):
        console.print(line)


if __name__ == "__main__":
    cli.run(main, "export")
