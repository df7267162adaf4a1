"""python -m benchmarks.lora --data path/to/gsm8k: what a training step of CODI costs with LoRA, and without.

Sides, which take turns in one process: the whole model is trained; LoRA as published (rank 128, dropout 0.1); the same
without dropout; and the same without dropout, but the gradients of the frozen weights computed, as they would be if
nobody looked whether a weight is frozen. Memory is counted, not measured: what is kept for the way back, gradients, and
moments of AdamW.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common import SIZES, add_block_options, load_problems, make_parser, report, take_turns
from benchmarks.train_step import median_batch
from simcot_latent.config import LatentConfig, LoRAConfig, MethodConfig, RunConfig
from simcot_latent.data.batch import to_device
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.distributed import autocast, pick_device
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, set_block_options
from simcot_latent.training.optimizer import make_optimizers, update

SIDES = {
    "whole": LoRAConfig(),
    "lora": LoRAConfig(rank=128, dropout=0.1),
    "no dropout": LoRAConfig(rank=128),
    "not frozen": LoRAConfig(rank=128),
}


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    problems = load_problems(args.data, "train", 16 * args.batch_size)
    sides = {name: Side.make(name, problems, args) for name in SIDES}
    memory = {name: side.memory() for name, side in sides.items()}
    steps: dict[str, Callable[[], object]] = {name: partial(side.step) for name, side in sides.items()}
    seconds = take_turns(steps, args.repeats, device=sides["whole"].device)
    rows: list[dict[str, Any]] = []
    columns = ("side", "trained", "s", "s / whole", "kept, MB", "gradients, MB", "moments, MB")
    table = Table(*columns)
    for name, side in sides.items():
        median = statistics.median(seconds[name])
        row = {"side": name, "trained": side.trained, "s": median} | memory[name]
        row["to_whole"] = median / statistics.median(seconds["whole"])
        rows.append(row)
        table.add_row(
            name, f"{side.trained:,}", f"{median:.3f}", f"{row['to_whole']:.2f}",
            *(f"{row[key]:.0f}" for key in ("kept_mb", "gradients_mb", "moments_mb")),
        )  # fmt: skip
    report("lora", args, rows, table)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="G")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--thoughts", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_block_options(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side, after two that do not count")
    return parser.parse_args()


@dataclass
class Side:
    """A method with a batch, ready to take steps."""

    method: Method
    optimizers: list[torch.optim.Optimizer]
    batch: Any
    totals: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    trained: int

    @classmethod
    def make(cls, name: str, problems: list[Problem], args: argparse.Namespace) -> Side:
        torch.manual_seed(args.seed)
        device = pick_device(args.device)
        run = RunConfig("", {}, {}, {}, lora=SIDES[name], rationale="equations", optimizer="adamw")
        width = SIZES[args.size].n_embd
        latent = LatentConfig(n_latents=args.thoughts, projector_width=width, warmup=0, stages=0)
        config = MethodConfig(loop="sequential", distill=["hidden"], written="joint", latent=latent)
        with device:
            method = Method(GPT(SIZES[args.size]), default_tokenizer(), run, config).train()
        set_block_options(method, args.compile, args.activation_checkpointing)
        batch, _ = median_batch(method, problems, args.batch_size, args.seed)
        totals = {key: value.to(device) for key, value in batch.totals.items()}
        optimizers = make_optimizers(method, run)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        if name == "not frozen":
            method.requires_grad_()
        return cls(method, optimizers, to_device(batch, device), totals, device, getattr(torch, args.dtype), trained)

    def loss(self) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.method(self.batch, self.totals)["loss"]

    def step(self) -> None:
        """A training step."""
        self.loss().backward()
        update(self.method.parameters(), self.optimizers, max_norm=2.0)
        self.method.zero_grad(set_to_none=True)

    def memory(self) -> dict[str, float]:
        """Megabytes that a step takes beside the weights."""
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = self.loss()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.method.parameters() if p.grad is not None)
        self.method.zero_grad(set_to_none=True)
        weights = {p.untyped_storage().data_ptr() for p in self.method.parameters()}
        activations = sum(size for place, size in kept.items() if place not in weights)
        found = {"kept_mb": activations, "gradients_mb": gradients, "moments_mb": 2 * 4 * self.trained}
        return {key: value / 1e6 for key, value in found.items()}


if __name__ == "__main__":
    main()
