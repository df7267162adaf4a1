"""The GPT that a published configuration and weights describe, and back.

What differs between families is data (`families.py`); this is what is done with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from simcot_latent.errors import UserError, some
from simcot_latent.interop.families import FAMILIES, Family, family_of
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.lora import plain_weights


class PublishedModel(Protocol):
    """What `build` reads: a Hugging Face configuration and weights by their Hugging Face names."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...


def build(published: PublishedModel) -> GPT:
    """The GPT that a configuration and weights describe, in float32.

    Raises:
        UserError: it is of another family, has a value that we do not compute, or a tensor is missing, left over or of
            another shape.
    """
    file = published.path / "config.json" if published.path.is_dir() else published.path
    family = family_of(published.config, file)
    config = family.config_of(published.config, file)
    model = without_weights(config, published.tensors, family, file)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    theirs = {name: name for name in published.tensors if not name.endswith(family.ignored)}
    """The names in the file, by those that the family has."""
    if theirs and all(name.startswith((f"model.{family.body}", "model.lm_head.")) for name in theirs):
        theirs = {name.removeprefix("model."): file for name, file in theirs.items()}  # an attribute of a trainer's
    if not any(name.startswith(family.body) for name in theirs):  # a bare model, saved without its head
        theirs = {name if name.startswith("lm_head.") else family.body + name: file for name, file in theirs.items()}
    tensors = {name: published.tensors[file] for name, file in theirs.items()}
    if config.tie_head and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        table = tensors.setdefault(f"{family.body}{family.modules['embedding'][0]}.weight", head)
        if not torch.equal(table, head):
            raise UserError(
                f"{published.path}: {theirs['lm_head.weight']} is not the embedding, though the configuration ties them"
            )

    state: dict[str, Tensor] = {}
    lacking: list[str] = []
    misshapen: list[str] = []
    for ours, parts in family.names(shapes):
        shape = shapes[ours]
        found: list[Tensor] = []
        for (name, module), rows in zip(parts, part_rows(shape[0], len(parts), config), strict=True):
            tensor = tensors.pop(name, None)
            if tensor is None:
                lacking.append(name)
                continue
            right = family.turned(torch.empty(rows, *shape[1:], device="meta"), ours).shape
            if tensor.shape != right:
                misshapen.append(f"{theirs.get(name, name)} of shape {tuple(tensor.shape)}, not {tuple(right)}")
                continue
            tensor = family.turned(tensor, ours)
            found.append(family.reorder[module](tensor, config) if module in family.reorder else tensor)
        if len(found) == len(parts):
            state[ours] = torch.cat([tensor.float() for tensor in found]).contiguous()
    if family.norm_biases:
        tensors = {n: x for n, x in tensors.items() if not (n.endswith("norm.bias") and x.count_nonzero() == 0)}
    problems = [f"lacks {some(lacking)}"] if lacking else []
    problems += [f"has {some(misshapen)}"] if misshapen else []
    problems += (
        [f"has {some(theirs[name] for name in tensors)}, which a {family.model_type} has not"] if tensors else []
    )
    if problems:
        raise UserError(
            f"{published.path}: does not hold the weights that its configuration says: it {'; it '.join(problems)}"
        )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_()


def without_weights(config: GPTConfig, names: Collection[str], family: Family, file: Path) -> GPT:
    """A model on the `meta` device, which takes no memory but for its blocks: those are counted first.

    Raises:
        UserError: the configuration says more blocks than there are weights of, or more numbers than a tensor can have.
    """
    block = re.compile(r"(?:^|\.)" + r"([0-9]+)".join(map(re.escape, family.layer.split("{}"))))
    blocks = {match[1] for match in map(block.search, names) if match}
    if config.n_layer > len(blocks):
        raise UserError(f"{file}: {family.keys['n_layer']}={config.n_layer}: there are weights of {len(blocks)} blocks")
    try:
        with torch.device("meta"):
            return GPT(config)
    except RuntimeError as error:
        raise UserError(f"{file}: says a model larger than any") from error


def part_rows(rows: int, parts: int, config: GPTConfig) -> list[int]:
    """How many rows of one of our weights each of theirs holds: queries, keys and values, or a gate and its values."""
    if parts == 3:
        keys = config.kv_heads * config.head_width
        return [rows - 2 * keys, keys, keys]
    return [rows // parts] * parts


def describe(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and weights of a model as its family publishes them; the inverse of `build`.

    Raises:
        UserError: no family is like it.
    """
    config = model.config
    family = min(FAMILIES, key=lambda family: len(family.differences(config)))
    if differences := family.differences(config):
        raise UserError(
            f"no published family is like this model: a {family.model_type}, the nearest, has not "
            f"{', '.join(differences)}"
        )
    state = plain_weights(model)
    tensors: dict[str, Tensor] = {}
    for ours, parts in family.names({name: value.shape for name, value in state.items()}):
        rows = part_rows(len(state[ours]), len(parts), config)
        for (name, module), tensor in zip(parts, state[ours].split(rows), strict=True):
            if module in family.reorder:
                tensor = family.reorder[module](tensor, config)
            tensors[name] = family.turned(tensor, ours).contiguous()
    if family.norm_biases and not config.bias:
        scales = {name: x for name, x in tensors.items() if name.endswith("norm.weight")}
        tensors |= {name.replace("norm.weight", "norm.bias"): torch.zeros_like(x) for name, x in scales.items()}
    return family.describe(config), tensors
