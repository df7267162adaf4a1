"""What the benchmarks share: sizes, turns, reports."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import Split
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.model.gpt import GPTConfig

SIZES = {
    "S": GPTConfig(vocab_size=8192, n_layer=4, n_head=4, n_embd=256),
    "G": GPTConfig(
        vocab_size=50257,
        n_layer=12,
        n_head=12,
        n_embd=768,
        positions="learned",
        activation="gelu_tanh",
        bias=True,
    ),
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
    "L": GPTConfig(
        vocab_size=128256,
        n_layer=16,
        n_head=32,
        n_kv_head=8,
        n_embd=2048,
        ffn_width=8192,
        norm="rmsnorm",
        activation="swiglu",
        rope_base=5e5,
    ),
}
"""S: small; G: GPT-2 small, as configs/model/gpt2.yaml; M: the shape of SmolLM2-135M; L: that of Llama-3.2-1B."""


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="GSM8K: a folder or a file of {question, answer}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def add_block_options(parser: argparse.ArgumentParser) -> None:
    """The training options that change what a block does."""
    parser.add_argument("--compile", action="store_true", help="compile=true")
    parser.add_argument("--activation-checkpointing", action="store_true", help="activation_checkpointing=true")


def load_problems(data: str | None, split: Split, count: int) -> list[Problem]:
    """The first problems of GSM8K, a folder or a file of it; None: of the embedded data, which are shorter."""
    if data is None:
        return list(Arithmetic(train_size=count, test_size=count).load(split).problems)
    return list(GSM8K(path=data).load(split).problems[:count])


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds that each side took in each repeat, the sides taking turns; the first `warmup` turns do not count.

    Args:
        device: where they work; None: the CPU.
    """
    device = device or torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, run in sides.items():
            synchronise(device)
            began = time.perf_counter()
            run()
            synchronise(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(seconds: Mapping[str, list[float]], ours: str, other: str) -> dict[str, float]:
    """Median of ours over median of the other, and the lowest and highest ratio of two neighbouring turns."""
    pairs = sorted(a / b for a, b in zip(seconds[ours], seconds[other], strict=True))
    ratio = statistics.median(seconds[ours]) / statistics.median(seconds[other])
    return {"ratio": ratio, "ratio_lowest": pairs[0], "ratio_highest": pairs[-1]}


def report(name: str, args: argparse.Namespace, rows: list[dict[str, Any]], table: Table, **more: Any) -> None:
    """Prints the table; writes it with all that is needed to get it again, where a file is asked for."""
    Console().print(table)
    if args.out is None:
        return
    settings = {key: value for key, value in vars(args).items() if key not in ("data", "out")}
    content = {
        "benchmark": name,
        "machine": {"processor": processor(), "system": platform.platform()},
        "versions": versions(),
        **settings,
        **more,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of what a figure depends on; a checkout that is not installed has none of its own."""
    found: dict[str, str] = {}
    for package in ("torch", "transformers", "simcot_latent"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name, and the GPU's, where the system tells it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
