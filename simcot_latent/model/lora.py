"""LoRA: frozen linear layers, and a trained change of low rank beside each.

Source: https://arxiv.org/abs/2106.09685, section 4.1.

    y = W x + alpha / R * B A drop(x)

A starts as any weight of `nn.Linear` does and B as zeros, so that the model starts as it was. A and B are `Linear`
themselves: within `gathered_gradients` theirs are gathered, and W, which is frozen, gathers nothing.

Why not `peft` (tried: 0.21.2)? It does wrap our layers, fused or not, and finds the right gradients, but

- with `activation_checkpointing` its dropout draws another mask when a block is computed again, so that the gradients
  are wrong: blocks keep the state of random generators only where they are told that they draw (`Block.draws`);
- it moves the weight of a layer to another name (`base_layer`), by which neither checkpoints, nor a decoder that starts
  as a copy of the base (`decoder.init=base` ends in a KeyError) find it;
- its factors are plain `nn.Linear`, the gradients of which are worked out in every pass of a thought;
- it has one pair of factors per layer, where published recipes for Llama have one for each of q, k, v, gate and up,
  which are parts of fused layers here (`LoRA.split`);
- it needs `accelerate` and `psutil`, and wraps around what is 60 lines here.

Shapes: P tokens, I numbers in, O numbers out, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from simcot_latent.errors import require
from simcot_latent.model.gpt import GPT, Block, GPTConfig
from simcot_latent.model.linear import LastRows, Linear

TARGETS = {"qkv": "attention", "out": "attention", "up": "mlp", "down": "mlp"}
"""The linear layers of a block, and the part of it that they are in."""


@dataclass(frozen=True)
class LoRA:
    """Which layers of a model have factors, and of which shape: all that it takes to load them.

    Attributes:
        rank: R.
        alpha: the change counts alpha / R.
        targets: the layers of all blocks that are changed, some of `TARGETS`.
        split: whether queries, keys, values, gate and up have a pair of factors each, as where they are layers of their
            own (Llama); or else a fused layer has one pair (GPT-2).
        rows: how many of the last rows of embedding table and output head are trained as well.
        merged: whether a checkpoint's model holds the change in its weights, so that no factors are beside it.
    """

    rank: int
    alpha: float
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    split: bool = False
    rows: int = 0
    merged: bool = False

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "above 0, finite")
        known = 1 <= len(self.targets) == len({*self.targets} & {*TARGETS})
        require(known, "lora.targets", self.targets, f"some of {', '.join(TARGETS)}, each once")
        require(self.rows >= 0, "lora.rows", self.rows, "at least 0")


class LoRALinear(Linear):
    """A frozen layer and the factors of its change. It has the layer's weight by the layer's own name.

    Args:
        layer: whose weight and bias it takes over.
        rank, alpha: see `LoRA`.
        outputs: of how many outputs each pair of factors is.
        dropout: the share of numbers that factors do not see in training.
    """

    def __init__(self, layer: Linear, rank: int, alpha: float, outputs: Sequence[int], dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # not that of `nn.Linear`, which makes a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = Linear(layer.in_features, rank * len(outputs), bias=False)
        self.lora_B = nn.ModuleList(Linear(rank, count, bias=False) for count in outputs)
        for factor in self.lora_B.parameters():
            nn.init.zeros_(factor)

    def forward(self, input: Tensor) -> Tensor:
        y_PO = super().forward(input)
        scale = self.scale
        if self.training and self.dropout > 0:
            dropped, kept = dropped_out(input, self.dropout)
            input, scale = input.masked_fill(dropped, 0), scale / kept  # a factor of few numbers, not of the input's
        hidden = (self.lora_A(input) * scale).chunk(len(self.lora_B), dim=-1)
        changes = [factor(x_PR) for factor, x_PR in zip(self.lora_B, hidden, strict=True)]
        return y_PO + (changes[0] if len(changes) == 1 else torch.cat(changes, dim=-1))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight (O, I) of a plain layer that does the same."""
        pairs = zip(self.lora_B.parameters(), self.lora_A.weight.chunk(len(self.lora_B)), strict=True)
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight + self.scale * torch.cat([b_OR @ a_RI for b_OR, a_RI in pairs])


def dropped_out(x: Tensor, share: float) -> tuple[Tensor, float]:
    """Which numbers are left out, drawn anew from PyTorch's own generator, and the share of those that are kept."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return torch.rand_like(x, dtype=torch.float32) < share, 1 - share
    # On a CPU, whose generator is slow, as slow as the layer's product: 16 random bits for each number.
    below = round(share * 2**16)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits < below - 2**15, 1 - below / 2**16


def add_lora(model: GPT, lora: LoRA, dropout: float = 0.0, device: torch.device | str | None = None) -> None:
    """Freezes a model and puts factors beside layers of its blocks. If it has some already, they are merged first.

    Args:
        dropout: see `LoRALinear`.
        device: where the factors are made; None: where the model is.
    """
    merge(model)
    model.requires_grad_(False)
    for block in blocks(model):
        for name in lora.targets:
            parent: nn.Module = getattr(block, TARGETS[name])
            layer: Linear = getattr(parent, name)
            outputs = outputs_of(model.config, name, layer.out_features) if lora.split else [layer.out_features]
            with torch.device(layer.weight.device if device is None else device):
                setattr(parent, name, LoRALinear(layer, lora.rank, lora.alpha, outputs, dropout))
        block.draws = dropout > 0
    for table in tables(model):
        table.train_last_rows(lora.rows)


def outputs_of(config: GPTConfig, layer: str, count: int) -> list[int]:
    """How many of a layer's outputs belong to each layer that it stands for: q, k and v, or gate and up."""
    if layer == "qkv":
        return [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    return [count // 2] * 2 if layer == "up" and config.activation == "swiglu" else [count]


def blocks(model: GPT) -> list[Block]:
    """The blocks of a model."""
    return [part for part in model.modules() if isinstance(part, Block)]


def tables(model: nn.Module) -> list[LastRows]:
    """Embedding table and output head, but not those of positions."""
    return [part for part in ([model.embedding, model.head] if isinstance(model, GPT) else []) if part is not None]


def layers_of(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers within a module that have factors, by name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, LoRALinear))


def plain_weights(module: nn.Module, merged: bool = True) -> dict[str, Tensor]:
    """What a module without LoRA has, by name: the change merged into its weights, or left out.

    Trained rows of tables are there in either case.
    """
    for table in tables(module):
        table.current()
    state = module.state_dict()
    added = added_weights(module)
    changed = {f"{name}.weight": layer.merged() for name, layer in layers_of(module)} if merged else {}
    return {name: weight for name, weight in (state | changed).items() if name not in added}


def added_weights(module: nn.Module) -> dict[str, Tensor]:
    """What a module has more than one without LoRA, by name: the factors, and trained rows."""
    state = module.state_dict()
    inside = tuple(f"{name}.lora_{factor}." for name, _ in layers_of(module) for factor in "AB")
    return {name: x for name, x in state.items() if name.startswith(inside) or name in ("embedding.rows", "head.rows")}


def frozen_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that merging changes, as they are without."""
    return {f"{name}.weight": layer.weight.detach() for name, layer in layers_of(module)}


def merge(model: GPT) -> None:
    """Takes the factors away and leaves what they do in plain layers, of which everything is trained again."""
    weights, layers = plain_weights(model), list(layers_of(model))
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weights[f"{name}.weight"]), layer.bias
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    for block in blocks(model):
        block.draws = False
    for table in tables(model):
        table.rows = None
    if layers:
        model.requires_grad_()
