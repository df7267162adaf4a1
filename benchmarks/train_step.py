"""python -m benchmarks.train_step --data path/to/gsm8k: a latent training step against its bound.

The bound is an ordinary teacher-forced forward, backward and optimizer step of the same modules over the same number of
tokens: base tokens (question, thoughts, answer) in one pass and decoder tokens in another, rows of equal length, no
padding, logits at as many positions as there are labels. A thought cannot be cheaper than a token; this says how much
dearer it is. The two take turns in one process; what is reported is the ratio of their medians. Batches are ready made,
so reading data is on neither side.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from simcot_latent.config import LatentConfig, LossConfig, RunConfig, as_plain, config_dir
from simcot_latent.data.batch import BatchOrder
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.objectives.latent import LatentBatch, LatentObjective, LatentObjectiveConfig
from simcot_latent.optimizer import make_optimizers, update

SIZES = {
    "S": GPTConfig(vocab_size=8192, n_layer=4, n_head=4, n_embd=256),
    "G": GPTConfig(vocab_size=50257, **as_plain(OmegaConf.load(config_dir() / "model" / "gpt2.yaml"))),
    "M": GPTConfig(
        vocab_size=49152,
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        n_embd=576,
        ffn_width=1536,
        norm="rmsnorm",
        activation="swiglu",
        rope_base=1e5,
    ),
}
"""S: small; G: GPT-2 small; M: the shape of SmolLM2-135M."""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    problems = GSM8K(path=args.data).load("train").problems[:2048]
    rows = [
        measure(size, batch_size, problems, args)
        for size in args.sizes
        for batch_size in track(args.batch_sizes, f"size {size}", console=Console(stderr=True))
    ]
    report = {
        "benchmark": "train_step",
        "machine": {"processor": processor(), "system": platform.platform()},
        "torch": torch.__version__,
        "threads": args.threads,
        "dtype": "float32",
        "seed": args.seed,
        "thoughts": args.thoughts,
        "latents_per_step": args.latents_per_step,
        "decoder_layers": args.decoder_layers,
        "optimizer": args.optimizer,
        "rows": rows,
    }
    table = Table("size", "batch", "base tokens", "decoder tokens", "ours, s", "bound, s", "ours / bound", "padding")
    for row in rows:
        table.add_row(
            row["size"], str(row["batch_size"]), str(row["base_tokens"]), str(row["decoder_tokens"]),
            f"{row['ours_s']:.3f}", f"{row['bound_s']:.3f}", f"{row['ratio']:.2f}", f"{row['padding']:.1%}",
        )  # fmt: skip
    Console().print(table)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="GSM8K: a folder or a file of {question, answer}")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--thoughts", type=int, default=10)
    parser.add_argument("--latents-per-step", type=int, default=2)
    parser.add_argument("--decoder-layers", type=int, default=1)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--repeats", type=int, default=15, help="steps of each side, after two that do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def measure(size: str, batch_size: int, problems: Sequence[Problem], args: argparse.Namespace) -> dict[str, Any]:
    """Medians of our step and of the bound, in seconds, at one size and batch size."""
    torch.manual_seed(args.seed)
    config, tokenizer = SIZES[size], default_tokenizer()
    run = RunConfig(
        objective="", mode="latent", model={}, data={}, tokenizer={}, rationale="equations", optimizer=args.optimizer
    )
    sections = LatentObjectiveConfig(
        latent=LatentConfig(args.thoughts, args.latents_per_step), loss=LossConfig(step_weight=1.0)
    )
    sections.decoder.n_layer = args.decoder_layers
    objective = LatentObjective(GPT(config), tokenizer, run, sections)
    optimizers = make_optimizers(objective, run)

    # The batches that training would see: shuffled, in buckets of length.
    examples = [objective.encode(problem) for problem in problems]
    order = BatchOrder([example.length for example in examples], batch_size, args.seed)
    batches = [objective.collate([examples[i] for i in order.batch(n)], objective.thoughts) for n in range(16)]
    batch = median_batch([batch for batch in batches if isinstance(batch, LatentBatch)])

    def ours() -> None:
        loss = objective(batch, batch.totals)["loss"]
        loss.backward()
        update(objective.parameters(), optimizers, max_norm=1.0)

    bound, tokens = make_bound(objective, batch, optimizers)
    seconds: dict[str, list[float]] = {"ours": [], "bound": []}
    for _ in range(args.repeats + 2):
        for name, step in (("ours", ours), ("bound", bound)):
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    pairs = sorted(a / b for a, b in zip(seconds["ours"][2:], seconds["bound"][2:], strict=True))
    padding = 1 - batch.totals["positions"].item() / batch.totals["slots"].item()
    return {
        "size": size,
        "batch_size": batch_size,
        **tokens,
        "padding": padding,
        "ours_s": medians["ours"],
        "bound_s": medians["bound"],
        "ratio": medians["ours"] / medians["bound"],
        "ratio_lowest": pairs[0],
        "ratio_highest": pairs[-1],
        "repeats": args.repeats,
    }


def median_batch(batches: list[LatentBatch]) -> LatentBatch:
    """The one of these batches that has the median number of positions."""
    return sorted(batches, key=lambda batch: batch.totals["positions"].item())[len(batches) // 2]


def make_bound(
    objective: LatentObjective, batch: LatentBatch, optimizers: list[torch.optim.Optimizer]
) -> tuple[Callable[[], None], dict[str, int]]:
    """The bound's step for a batch, and how many tokens it goes through: never fewer than the batch has."""
    model, decoder, V = objective.model, objective.step_decoder, objective.model.config.vocab_size
    B, K, N = batch.questions.rows, batch.n_latents, len(batch.row_N)
    base_tokens = len(batch.question_ids_P) + B * K + len(batch.text_ids_A)
    # As many inputs as teacher forcing takes: the group's thoughts, and its labels but the last.
    step_labels, decoder_tokens = len(batch.steps.label_M), len(batch.steps.packing)
    ids_BT = torch.randint(V, (B, -(-base_tokens // B)))
    ids_NL = torch.randint(V, (N, -(-decoder_tokens // N)))
    answer_labels = torch.randint(V, (len(batch.targets.label_M),))
    step_label_M = torch.randint(V, (step_labels,))
    weights = objective.config.loss

    def step() -> None:
        answer_hidden = model(ids_BT).flatten(0, 1)[-len(answer_labels) :]
        step_hidden = decoder.transformer(model.embedding(ids_NL)).flatten(0, 1)[-step_labels:]
        loss = weights.answer_weight * F.cross_entropy(model.logits(answer_hidden), answer_labels)
        loss = loss + weights.step_weight * F.cross_entropy(decoder.logits(step_hidden), step_label_M)
        loss.backward()
        update(objective.parameters(), optimizers, max_norm=1.0)

    return step, {"base_tokens": ids_BT.numel(), "decoder_tokens": ids_NL.numel()}


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
