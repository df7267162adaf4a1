"""python -m benchmarks.method_steps --data path/to/gsm8k: a training step of every method against its bound.

A method is the preset `method=X`, with the sizes of its paper, in its last stage, without LoRA. The bound is an
ordinary teacher-forced forward, backward and optimizer step of the same modules over as many tokens as the method reads
in all of its passes, in rows of equal length, without padding, with logits at as many positions as there are
labels: one pass over question, thoughts (all iterations of them) and text, one over the written solution where a term
needs it, one of the auxiliary decoder. Both take turns in one process; the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

import simcot_latent.method as method_module
from benchmarks.common import SIZES, compare, load_problems, make_parser, report, take_turns
from benchmarks.methods import METHODS
from benchmarks.train_step import median_batch
from simcot_latent.batches import ThoughtBatch, WrittenBatch
from simcot_latent.cli import use_parts
from simcot_latent.config import config_dir, parse
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.losses import CrossEntropy, Labelled, cross_entropy
from simcot_latent.terms.step_decoder import StepBatch
from simcot_latent.training.optimizer import make_optimizers, update

SMALL = ("coconut", "simcot_coconut", "soft", "pause", "pause_multipass")
"""Methods whose presets have the sizes of the embedded data."""

PAPER = ["latent.n_latents=10", "latent.latents_per_step=2"]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    problems = load_problems(args.data, "train", 2048)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        names = track(args.methods, f"size {args.size}", console=Console(stderr=True))
        rows = [measure(name, problems, args) for name in names]
    titles = ("method", "base tokens", "decoder tokens", "labels", "passes", "ours, s", "bound, s", "ours / bound")
    table = Table(*titles, "padding", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(
            row["method"], str(row["base_tokens"]), str(row["decoder_tokens"]), str(row["labels"]), str(row["passes"]),
            f"{row['ours_s']:.3f}", f"{row['bound_s']:.3f}", f"{row['ratio']:.2f}", f"{row['padding']:.1%}",
        )  # fmt: skip
    report("method_steps", args, rows, table)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--size", choices=SIZES, default="G")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side, after one that does not count")
    return parser.parse_args()


def measure(name: str, problems: Sequence[Problem], args: argparse.Namespace) -> dict[str, Any]:
    """Medians of a method's step and of its bound, in seconds."""
    torch.manual_seed(args.seed)
    raw = compose("train", overrides=[f"method={name}", "optimizer=adamw", *(PAPER if name in SMALL else [])])
    use_parts(raw)
    run, config = parse(raw)
    method = Method(GPT(SIZES[args.size]), default_tokenizer(), run, config)
    optimizers = make_optimizers(method, run)
    batch, _ = median_batch(method, problems, args.batch_size, args.seed)
    bound_loss, found = bound(method, batch)

    def step(find_loss: Callable[[], torch.Tensor]) -> None:
        find_loss().backward()
        update(method.parameters(), optimizers, max_norm=1.0)

    sides = {"ours": lambda: step(lambda: method(batch, batch.totals)["loss"]), "bound": lambda: step(bound_loss)}
    seconds = take_turns(sides, args.repeats, warmup=1)
    found |= {"method": name, "padding": 1 - (batch.totals["positions"] / batch.totals["slots"]).item()}
    found |= {f"{side}_s": statistics.median(values) for side, values in seconds.items()}
    return found | compare(seconds, "ours", "bound")


def bound(method: Method, batch: ThoughtBatch | WrittenBatch) -> tuple[Callable[[], torch.Tensor], dict[str, Any]]:
    """The bound's loss for a batch, and what it goes through: never fewer tokens or labels than the method does."""
    model, decoder, V = method.model, method.step_decoder, method.model.config.vocab_size
    B, written_tokens, decoder_tokens, step_labels, n_steps, passes = rows_of(batch), 0, 0, 0, 0, 1
    if isinstance(batch, ThoughtBatch):
        if batch.written is not None:
            written_tokens = len(batch.written.ids_P)
        for taught in batch.terms.values():
            if isinstance(taught, StepBatch):
                decoder_tokens, step_labels = len(taught.steps.packing), len(taught.steps.label_M)
                n_steps = len(taught.row_N)
        if batch.given is None and method.loop is not None:
            passes = 2 + len(method.loop.passes(batch.counts))
    labels = count_labels(method, batch) - step_labels
    thought_tokens = int(batch.totals["positions"].item()) - written_tokens - decoder_tokens
    ids = [torch.randint(V, (B, -(-n // B))) for n in (thought_tokens, written_tokens) if n]
    step_ids = torch.randint(V, (n_steps, -(-decoder_tokens // n_steps))) if n_steps else None
    label_M, step_label_M = torch.randint(V, (labels,)), torch.randint(V, (step_labels,))

    def loss() -> torch.Tensor:
        hidden = torch.cat([model(ids_BT).flatten(0, 1) for ids_BT in ids])
        found = F.cross_entropy(model.logits(hidden[-labels:]), label_M)
        if step_ids is not None and decoder is not None:
            step_hidden = decoder.transformer(model.embedding(step_ids)).flatten(0, 1)[-step_labels:]
            found = found + F.cross_entropy(decoder.logits(step_hidden), step_label_M)
        return found

    counts = {"base_tokens": sum(x.numel() for x in ids), "decoder_tokens": 0 if step_ids is None else step_ids.numel()}
    return loss, counts | {"labels": labels + step_labels, "passes": passes}


def rows_of(batch: ThoughtBatch | WrittenBatch) -> int:
    """The problems of a batch."""
    return batch.packing.rows if isinstance(batch, WrittenBatch) else batch.texts.rows


def count_labels(method: Method, batch: ThoughtBatch | WrittenBatch) -> int:
    """The labels that a step asks cross-entropies of, whatever terms they are of."""
    seen: list[int] = []

    def spy(*labelled: Labelled, softcap: float | None) -> CrossEntropy:
        seen.extend(len(each.label_M) for each in labelled)
        return cross_entropy(*labelled, softcap=softcap)

    with patch.object(method_module, "cross_entropy", spy), torch.no_grad():
        method(batch, batch.totals)
    return sum(seen)


if __name__ == "__main__":
    main()
