"""python -m benchmarks.train_step --data path/to/gsm8k: a training step against its bound, and against peers.

The bound is an ordinary teacher-forced forward, backward and optimizer step of the same modules over the same number of
tokens, rows of equal length, no padding, logits at as many positions as there are labels. In mode latent these are the
base tokens (question, thoughts, answer) in one pass and the decoder's in another: a thought cannot be cheaper than a
token; this says how much dearer it is. All sides take turns in one process; what is reported is the ratio of their
medians. Batches are ready made, so reading data is on no side. `--compile` and `--activation-checkpointing` hold for
the bound too. With `--dtype bfloat16` our step in float32 takes its turns as well.

In mode latent a third side is the thoughts' matrix products and nothing else: each weight of the blocks times a row a
problem, forward and back, one thought after the other. No step can do without them, whatever it is written in, and they
are slower than the same products over many tokens at once.

Peers: in mode latent `coconut-pytorch`, which has no auxiliary decoder and so does less; in mode weighted a plain
fine-tuning step of `transformers`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import (
    SIZES,
    add_block_options,
    compare,
    load_problems,
    make_parser,
    report,
    take_turns,
)
from benchmarks.peers import coconut_step, transformers_step
from simcot_latent.batches import ThoughtBatch, WrittenBatch
from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.batch import BatchOrder, to_device
from simcot_latent.data.format import Example, concatenate
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.distributed import autocast, pick_device
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, set_block_options
from simcot_latent.model.linear import Linear, product
from simcot_latent.terms.step_decoder import StepBatch
from simcot_latent.training.optimizer import make_optimizers, update


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    problems = load_problems(args.data, "train", 2048)
    rows = [
        measure(size, batch_size, problems, args)
        for size in args.sizes
        for batch_size in track(args.batch_sizes, f"size {size}", console=Console(stderr=True))
    ]
    columns = ("size", "batch", "base tokens", "decoder tokens", "ours, s", "bound, s", "ours / bound", "padding")
    ratios = {
        "products_to_bound": "products / bound",
        "peer_to_ours": "peer / ours",
        "float32_to_ours": "float32 / ours",
    }
    ratios = {key: title for key, title in ratios.items() if key in rows[0]}
    table = Table(*columns, *ratios.values(), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(
            row["size"], str(row["batch_size"]), str(row["base_tokens"]), str(row["decoder_tokens"]),
            f"{row['ours_s']:.3f}", f"{row['bound_s']:.3f}", f"{row['ratio']:.2f}", f"{row['padding']:.1%}",
            *(f"{row[key]:.2f}" for key in ratios),
        )  # fmt: skip
    report("train_step", args, rows, table)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--mode", choices=("latent", "weighted"), default="latent")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--thoughts", type=int, default=10)
    parser.add_argument("--latents-per-step", type=int, default=2)
    parser.add_argument("--decoder-layers", type=int, default=1)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_block_options(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="time the peers too, in float32, on the CPU")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each side, after two that do not count")
    return parser.parse_args()


@dataclass
class Bench:
    """A model of a size with a batch to train on, ready to take steps.

    Attributes:
        method: what is trained.
        batch: the batch, on the device; `examples` are what it was made of.
        totals: its totals, there too.
        bound_loss: the loss of the bound; see the module.
        tokens: tokens of the bound.
        dtype: number format of a step, unless it is told another.
    """

    method: Method
    optimizers: list[torch.optim.Optimizer]
    batch: Any
    examples: list[Example]
    totals: dict[str, torch.Tensor]
    bound_loss: Callable[[], torch.Tensor]
    tokens: dict[str, int]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def make(cls, size: str, batch_size: int, problems: Sequence[Problem], args: argparse.Namespace) -> Bench:
        """As the arguments of the command say, at one size and batch size."""
        torch.manual_seed(args.seed)
        device = pick_device(args.device)
        method = make_method(size, args, device)
        set_block_options(method, args.compile, args.activation_checkpointing)
        cpu_batch, examples = median_batch(method, problems, batch_size, args.seed)
        batch = to_device(cpu_batch, device)
        make_bound = latent_bound if isinstance(batch, ThoughtBatch) else weighted_bound
        bound_loss, tokens = make_bound(method, batch)  # type: ignore[arg-type]
        totals = {key: value.to(device) for key, value in cpu_batch.totals.items()}
        optimizers = make_optimizers(method, method.run)
        dtype = getattr(torch, args.dtype)
        return cls(method, optimizers, batch, examples, totals, bound_loss, tokens, device, dtype)

    def ours(self, dtype: torch.dtype | None = None) -> None:
        """A training step as ours is."""
        self._step(lambda: self.method(self.batch, self.totals)["loss"], dtype or self.dtype)

    def bound(self) -> None:
        """A training step of the bound."""
        self._step(self.bound_loss, self.dtype)

    def _step(self, find_loss: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        with autocast(self.device, dtype):
            loss = find_loss()
        loss.backward()
        update(self.method.parameters(), self.optimizers, max_norm=1.0)


def measure(size: str, batch_size: int, problems: Sequence[Problem], args: argparse.Namespace) -> dict[str, Any]:
    """Medians of our step, of the bound and of what else is timed, in seconds, at one size and batch size."""
    bench = Bench.make(size, batch_size, problems, args)
    method, batch = bench.method, bench.batch
    sides: dict[str, Callable[[], None]] = {"ours": bench.ours, "bound": bench.bound}
    if isinstance(batch, ThoughtBatch):
        products = partial(thought_products, method.model, batch.questions.rows, max(batch.counts), bench.dtype)
        sides["products"] = products
    if bench.dtype != torch.float32:
        sides["float32"] = partial(bench.ours, torch.float32)
    if args.peers:
        sides["peer"] = make_peer(method, bench.examples, args.thoughts)
    seconds = take_turns(sides, args.repeats, device=bench.device)
    found: dict[str, Any] = {"size": size, "batch_size": batch_size, **bench.tokens}
    found["padding"] = 1 - batch.totals["positions"].item() / batch.totals["slots"].item()
    found |= {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    found |= compare(seconds, "ours", "bound")
    if "products" in sides:
        found["products_to_bound"] = found["products_s"] / found["bound_s"]
    for name in sides.keys() - {"ours", "bound", "products"}:
        found[f"{name}_to_ours"] = found[f"{name}_s"] / found["ours_s"]
    return found


def make_method(size: str, args: argparse.Namespace, device: torch.device) -> Method:
    """A new model of a size, and the method that trains it; both are made where they are to be."""
    with device:
        return _make_method(GPT(SIZES[size]), args)


def _make_method(model: GPT, args: argparse.Namespace) -> Method:
    tokenizer = default_tokenizer()
    rationale = "equations" if args.mode == "latent" else "natural"
    run = RunConfig(mode=args.mode, model={}, data={}, tokenizer={}, rationale=rationale, optimizer=args.optimizer)
    if args.mode == "weighted":
        return Method(model, tokenizer, run, MethodConfig())
    latent, decoder = LatentConfig(args.thoughts, args.latents_per_step), DecoderConfig(args.decoder_layers)
    return Method(model, tokenizer, run, MethodConfig.simcot(latent, decoder, LossConfig(step_weight=1.0)))


def median_batch(method: Method, problems: Sequence[Problem], batch_size: int, seed: int) -> tuple[Any, list[Example]]:
    """Of 16 batches that training would see (shuffled, in buckets of length), the one of median size; its examples."""
    examples = [method.encode(problem) for problem in problems]
    order = BatchOrder([example.length for example in examples], batch_size, seed)
    candidates = [[examples[i] for i in order.batch(n)] for n in range(16)]
    sized = [(method.collate(rows, method.last_stage), rows) for rows in candidates]
    return sorted(sized, key=lambda pair: pair[0].totals["positions"].item())[len(sized) // 2]


def latent_bound(method: Method, batch: ThoughtBatch) -> tuple[Callable[[], torch.Tensor], dict[str, int]]:
    """The bound's loss for a batch, and how many tokens it goes through: never fewer than the batch has."""
    model, decoder, V = method.model, method.step_decoder, method.model.config.vocab_size
    taught: StepBatch = batch.terms["step"]
    B, K, N, device = batch.questions.rows, max(batch.counts), len(taught.row_N), taught.row_N.device
    base_tokens = len(batch.question_ids_P) + B * K + len(batch.text_ids_A)
    # As many inputs as teacher forcing takes: the group's thoughts, and its labels but the last.
    step_labels, decoder_tokens = len(taught.steps.label_M), len(taught.steps.packing)
    ids_BT = torch.randint(V, (B, -(-base_tokens // B)), device=device)
    ids_NL = torch.randint(V, (N, -(-decoder_tokens // N)), device=device)
    answer_labels = torch.randint(V, (len(batch.targets),), device=device)
    step_label_M = torch.randint(V, (step_labels,), device=device)
    weights = method.config.loss
    assert decoder is not None

    def loss() -> torch.Tensor:
        answer_hidden = model(ids_BT).flatten(0, 1)[-len(answer_labels) :]
        step_hidden = decoder.transformer(model.embedding(ids_NL)).flatten(0, 1)[-step_labels:]
        answer_loss = F.cross_entropy(model.logits(answer_hidden), answer_labels)
        return weights.answer_weight * answer_loss + weights.step_weight * F.cross_entropy(
            decoder.logits(step_hidden), step_label_M
        )

    return loss, {"base_tokens": ids_BT.numel(), "decoder_tokens": ids_NL.numel()}


@torch.no_grad()
def thought_products(model: GPT, rows: int, n_latents: int, dtype: torch.dtype) -> None:
    """The products of weights with thoughts and their gradients; the first thought comes of the question's pass.

    Weight gradients are not among them: they are one product over all thoughts, which costs what it costs in the bound.
    """
    weights = [part.weight.to(dtype) for part in model.transformer.blocks.modules() if isinstance(part, Linear)]
    device = model.embedding.weight.device
    x = {width: torch.ones(rows, width, dtype=dtype, device=device) for weight in weights for width in weight.shape}
    for _ in range(n_latents - 1):
        for weight_OI in weights:
            product(x[weight_OI.shape[1]], weight_OI, None)
    for _ in range(n_latents - 1):
        for weight_OI in reversed(weights):
            torch.mm(x[weight_OI.shape[0]], weight_OI)


def weighted_bound(method: Method, batch: WrittenBatch) -> tuple[Callable[[], torch.Tensor], dict[str, int]]:
    """As `latent_bound`, of written solutions."""
    model, V, B = method.model, method.model.config.vocab_size, batch.packing.rows
    device = batch.ids_P.device
    ids_BT = torch.randint(V, (B, -(-len(batch.ids_P) // B)), device=device)
    label_M = torch.randint(V, (len(batch.targets),), device=device)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model.logits(model(ids_BT).flatten(0, 1)[-len(label_M) :]), label_M)

    return loss, {"base_tokens": ids_BT.numel(), "decoder_tokens": 0}


def make_peer(method: Method, rows: Sequence[Example], thoughts: int) -> Callable[[], None]:
    """The peer's step on the same problems."""
    config = method.model.config
    if method.run.mode == "latent":
        return coconut_step(config, [row.question[:-1] for row in rows], [row.answer.ids for row in rows], thoughts)
    texts = [concatenate([row.rationale, row.answer]).ids for row in rows]
    return transformers_step(config, [row.question for row in rows], texts)


if __name__ == "__main__":
    main()
