"""python -m simcot_latent.import_checkpoint source=FILE_OR_FOLDER kind=KIND base=FOLDER out=DIR

See `interop.imported`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from simcot_latent import cli
from simcot_latent.checkpoint import write_checkpoint
from simcot_latent.config import typed
from simcot_latent.errors import UserError, require
from simcot_latent.folders import new_folder
from simcot_latent.interop.imported import KINDS, import_checkpoint
from simcot_latent.logs import make_console


@dataclass
class ImportConfig:
    """Keys of `configs/import.yaml`.

    Attributes:
        data: the source that evals and the probe take for this checkpoint's training data.
        source: what was published: a file of tensors (`.safetensors`, `.bin`, `.pt`, or one without suffix), a folder
            that holds one or its shards, or a hub id; required.
        kind: `coconut`, `simcot_coconut`, `codi` or `simcot_codi`; required.
        base: the model that it was made from, for its shape and tokenizer: whatever `init_from` takes; required.
        out: the checkpoint folder to write; new, or empty; required.
        n_latents: thoughts; None: as published, 10 (Coconut) or 6 (CODI).
        latents_per_step: thoughts per step; None: as published, 2 (Coconut) or 1 (CODI).
        lora_alpha: CODI's LoRA update is scaled by `lora_alpha` / rank.
    """

    data: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    kind: str | None = None
    base: str | None = None
    out: str | None = None
    n_latents: int | None = None
    latents_per_step: int | None = None
    lora_alpha: float = 32.0

    def __post_init__(self) -> None:
        for key, what in {
            "source": "FILE_OR_FOLDER, what was published",
            "kind": f"one of {', '.join(KINDS)}",
            "base": "FOLDER, the model that it was made from, for its shape and tokenizer",
            "out": "DIR, the checkpoint folder to write",
        }.items():
            if getattr(self, key) is None:
                raise UserError(f"{key} is missing; give {key}={what}")
        for key in ("n_latents", "latents_per_step"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "at least 1, or null: as published")
        require(0 < self.lora_alpha < math.inf, "lora_alpha", self.lora_alpha, "above 0, finite")


def main(raw: DictConfig) -> None:
    """Imports one checkpoint."""
    config = typed(ImportConfig, raw)
    console = make_console()
    with new_folder(config.out or "") as folder:
        checkpoint = import_checkpoint(
            config.source or "",
            config.kind or "",
            config.base or "",
            config.n_latents,
            config.latents_per_step,
            config.lora_alpha,
        )
        checkpoint.config["data"] = config.data
        write_checkpoint(checkpoint, folder)
    n_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    thoughts, decoder = checkpoint.stage.thoughts, checkpoint.step_decoder
    unfed = "" if checkpoint.n_states == thoughts else ", one state more only decoded"
    console.print(
        f"{config.kind} | {n_parameters:,} parameters | {thoughts} thoughts, {checkpoint.groups.latents_per_step} a "
        f"step{unfed} | {f'decoder of {decoder.config.n_layer} blocks' if decoder else 'no decoder'} | {config.out}"
    )


if __name__ == "__main__":
    cli.run(main, "import")
