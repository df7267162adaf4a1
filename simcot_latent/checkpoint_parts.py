"""The parts of a checkpoint besides the decoder, read from its folder: the model with its thought loop, and others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from simcot_latent.checkpoint_config import SavedConfig, SavedLoop
from simcot_latent.checkpoint_folders import CONFIG, LOOP, MODEL
from simcot_latent.errors import UserError
from simcot_latent.files import from_plain
from simcot_latent.loops.base import ThoughtLoop
from simcot_latent.loops.sequential import Sequential
from simcot_latent.model.gpt import GPT
from simcot_latent.model.lora import LoRA, add_lora, added_weights
from simcot_latent.parts import find
from simcot_latent.weights import (
    load_module,
    load_weights,
    read_shapes,
    read_tensors,
    require_finite,
    require_shapes,
)


def new_loop(saved: SavedLoop, width: int, folder: Path) -> ThoughtLoop:
    """The loop that a checkpoint names, its weights not read yet.

    Raises:
        UserError: the table of parts has none of its key, it has no such settings, or the file of its weights is
            missing or holds others.
    """
    file = folder / CONFIG
    cls = find("loop", saved.key, f"{file}: loop.key={saved.key}")
    try:
        settings = from_plain(cls.Config, saved.settings, "loop.settings")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    try:
        with torch.device("meta"):  # so that nothing of the size that the settings say is made before it is compared
            wanted = {name: weight.shape for name, weight in cls(width, settings).state_dict().items()}
    except (RuntimeError, NotImplementedError):  # a loop of one's own that works with numbers when it is made
        wanted = {}
    if wanted:
        in_model = {name: shape for name, shape in read_shapes(folder / MODEL).items() if name.startswith("projector.")}
        if in_model:  # up to format 2
            require_shapes(in_model, wanted, folder / MODEL)
        else:
            require_shapes(read_shapes(folder / LOOP), wanted, folder / LOOP)
    return cls(width, settings)


def load_model_and_loop(config: SavedConfig, loop: ThoughtLoop | None, folder: Path) -> GPT:
    """The model, and the weights of its loop.

    Raises:
        UserError: see `load_module`.
    """
    projector = loop.projector if isinstance(loop, Sequential) else None
    if projector is not None and "projector.up.weight" in read_shapes(folder / MODEL):  # up to format 2
        model = load_module(lambda shape: with_projector(GPT(shape), projector), config.model, folder / MODEL)
        loop.projector = model.projector  # type: ignore[union-attr, assignment]
        del model.projector
        return model
    if loop is not None and loop.state_dict():
        load_weights(loop, folder / LOOP)
    return load_module(GPT, config.model, folder / MODEL)


def read_part(file: Path) -> dict[str, Tensor]:
    """The weights of a further part, of which the folder does not say the shapes.

    Raises:
        UserError: the file is missing or broken, or a weight is not finite.
    """
    # Copies: what was read may be the file itself, mapped into memory.
    weights = {name: weight.clone() for name, weight in read_tensors(file).items()}
    require_finite(weights, file)
    return weights


def load_lora(model: GPT, lora: LoRA, file: Path) -> None:
    """Puts the factors of a file beside the layers of a model.

    Raises:
        UserError: the file is missing or broken, or a factor is missing, left over, of another shape or not finite.
    """
    add_lora(model, lora, device="meta")
    require_shapes(read_shapes(file), {name: x.shape for name, x in added_weights(model).items()}, file)
    # Copies: what was read may be the file itself, mapped into memory.
    weights = {name: x.to(torch.float32, copy=True) for name, x in read_tensors(file).items()}
    require_finite(weights, file)
    model.load_state_dict(weights, strict=False, assign=True)


def with_projector(model: GPT, projector: nn.Module) -> GPT:
    """A model as it was up to format 2, where the projector was a part of it."""
    model.projector = projector
    return model
