"""Checkpoints on the Hugging Face hub: what `Checkpoint.from_pretrained`, `.save_pretrained` and `.push_to_hub` do.

A repository there holds what a checkpoint folder holds, but for the state of training, and a model card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever network library its version uses
)

from simcot_latent.checkpoint import (
    CONFIG,
    DECODER,
    MANIFEST,
    MODEL,
    TOKENIZER,
    Checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from simcot_latent.config import one_line
from simcot_latent.errors import UserError
from simcot_latent.paths import expanded
from simcot_latent.published import HUB_ID

FILES = [CONFIG, MODEL, DECODER, MANIFEST, f"{TOKENIZER}/*"]
"""What of a repository is downloaded."""

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

```python
import simcot_latent as sl

checkpoint = sl.Checkpoint.from_pretrained("{{ title }}")
print(sl.answer(checkpoint, ["Mia has 14 shells. She finds 9 more shells. How many shells does Mia have now?"]))
```
"""


class HubCheckpoint(
    ModelHubMixin,
    library_name="simcot_latent",
    pipeline_tag="text-generation",
    tags=["latent-reasoning"],
    model_card_template=CARD,
):
    """A checkpoint in `huggingface_hub`'s hands; see https://huggingface.co/docs/huggingface_hub/guides/integrations."""

    # Where there is none, the mixin makes a configuration of the constructor's arguments: a copy of the whole model.
    _hub_mixin_config = {}  # noqa: RUF012

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def _save_pretrained(self, save_directory: Path) -> None:
        config = without_local_paths(self.checkpoint.config)
        write_checkpoint(replace(self.checkpoint, config=config), save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return super().generate_model_card(*args, summary=summary(self.checkpoint), **kwargs)


def from_pretrained(
    source: str | Path, device: str | torch.device = "cpu", verify: bool = True, **options: Any
) -> Checkpoint:
    """See `Checkpoint.from_pretrained`.

    The mixin's own `from_pretrained` would hand values of the repository's `config.json` on as arguments.
    """
    if expanded(source, "source").is_dir():
        return load_checkpoint(source, device, "source", verify)
    with hub_errors(f"source={source}: neither a checkpoint folder nor (as owner/name) one that the hub gives"):
        folder = snapshot_download(str(source), allow_patterns=FILES, **options)
    checkpoint = load_checkpoint(folder, device, "source", verify)
    return replace(checkpoint, config=without_local_paths(checkpoint.config))


def save_pretrained(checkpoint: Checkpoint, folder: str | Path) -> None:
    """See `Checkpoint.save_pretrained`."""
    HubCheckpoint(checkpoint).save_pretrained(folder, model_card_kwargs={"title": Path(folder).name})


def push_to_hub(checkpoint: Checkpoint, repo_id: str, **options: Any) -> str:
    """See `Checkpoint.push_to_hub`."""
    with hub_errors(f"repo_id={repo_id}: cannot be pushed to the hub"):
        return HubCheckpoint(checkpoint).push_to_hub(repo_id, model_card_kwargs={"title": repo_id}, **options)


def without_local_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what only holds on the machine that it ran on, where others would look in vain.

    So an eval of the source that it was trained on takes the hub's copy of the data.
    """
    config = deepcopy(config)
    start = str(config.get("init_from"))
    if Path(start).expanduser().exists() or not HUB_ID.fullmatch(start):
        config.pop("init_from", None)
    config.pop("out_dir", None)
    for section, key in (("data", "path"), ("tokenizer", "ranks")):
        if isinstance(config.get(section), dict) and key in config[section]:
            config[section][key] = None
    return config


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns whatever goes wrong on the way to the hub into a `UserError` of one line."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(f"{what} ({one_line(str(error))})") from error


def summary(checkpoint: Checkpoint) -> str:
    """What a model card says of a checkpoint."""
    thoughts, decoder = checkpoint.thoughts, checkpoint.step_decoder
    n_parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    lines = [f"A language model of {n_parameters:,} parameters, trained with `simcot_latent`."]
    if thoughts.n_latents:
        lines.append(
            f"Before it answers it thinks {thoughts.n_latents} latent thoughts, {thoughts.latents_per_step} a step."
        )
    if decoder is not None:
        lines.append(
            "An auxiliary decoder, which is not needed to answer, turns thoughts into the steps that they stand for "
            "(SIM-CoT, https://arxiv.org/abs/2509.20317)."
        )
    return "\n".join(lines)
