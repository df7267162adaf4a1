"""What the parts of the GPU benchmark share: options, reports, the card, runs of training.

Shapes: B rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import processor, synchronise, versions
from simcot_latent.checkpoint import Checkpoint, load_checkpoint
from simcot_latent.config import MethodConfig, RunConfig
from simcot_latent.data.problem import Problem, last_number, same_number
from simcot_latent.data.sources import Source
from simcot_latent.distributed import autocast, pick_device
from simcot_latent.errors import UserError
from simcot_latent.generate import generate_all
from simcot_latent.metrics import wilson_interval
from simcot_latent.train import train
from simcot_latent.training.setup import Start

NOMINAL_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bfloat16 matrix products, float32 accumulation, in 1e12 floating-point operations per second, as the makers'
data sheets have it. H100 and A100 are the SXM cards."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the whole benchmark and of every part."""
    parser.add_argument("--out", type=Path, help="folder of the reports; default: benchmarks/results/<card>")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--gsm8k", help="GSM8K: a folder or a file; default: the embedded problems")
    parser.add_argument("--weights", help="SmolLM2-135M: whatever init_from= takes; for the part learn")
    parser.add_argument("--commit", help="commit of this code, where git cannot tell")
    parser.add_argument("--seed", type=int, default=0)


def options_of(args: argparse.Namespace) -> list[str]:
    """The options that a part is to be started with, less those that each has of its own."""
    named = {"--device": args.device, "--gsm8k": args.gsm8k, "--weights": args.weights, "--seed": str(args.seed)}
    named["--commit"] = args.commit or commit()
    return [*(["--tiny"] if args.tiny else []), *(x for key, value in named.items() if value for x in (key, value))]


def parse_part(doc: str | None) -> argparse.Namespace:
    """The arguments of a part."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=600.0, help="what is not reached by then is left out")
    args = parser.parse_args()
    if args.tiny:  # at these sizes a second thread only gets in the way
        torch.set_num_threads(1)
    args.out = args.out or Path("runs/gpu")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


class Report:
    """What a part found: a JSON file that is written anew after every row.

    Args:
        part: its name.
        args: of `parse_part`.
        settings: what else the figures depend on.
    """

    def __init__(self, part: str, args: argparse.Namespace, **settings: Any) -> None:
        self.part, self.out, self.end = part, args.out, time.monotonic() + args.seconds
        self.content: dict[str, Any] = {
            "part": part,
            "state": "running",
            "headlines": [],
            "command": [part, *sys.argv[1:]],
            "commit": args.commit or commit(),
            "machine": machine(args.device),
            "versions": versions(),
            **settings,
            "rows": [],
            "left_out": [],
        }
        self.write()

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        """A row, on the disk at once."""
        self.content["rows"].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def leave_out(self, what: str, why: str) -> None:
        """Something that was not measured, and why."""
        self.content["left_out"].append({"what": what, "why": why})
        self.write()
        print(f"left out: {what} ({why})", flush=True)

    def headline(self, text: str) -> None:
        """A line for the table at the end."""
        self.content["headlines"].append(text)
        self.write()

    def write(self) -> None:
        write_report(self.out, self.part, self.content)


def write_report(out: Path, part: str, content: dict[str, Any]) -> None:
    """Writes a part's report beside its place, then puts it there: a part that is killed leaves a whole one."""
    partial = out / f".{part}.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(out / f"{part}.json")


def read_report(out: Path, part: str) -> dict[str, Any]:
    """A part's report; empty where it wrote none."""
    file = out / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# --- the machine -----------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """The card (or processor), its driver and clocks."""
    found: dict[str, Any] = {"card": card_name(device), "system": platform.platform(), "cores": os.cpu_count()}
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"memory_mb": properties.total_memory // 2**20, "cuda": torch.version.cuda}
        clocks = ("clocks.sm", "clocks.max.sm", "clocks.mem")
        found |= nvidia_smi("driver_version", *clocks, "power.limit", "temperature.gpu")
    return found


def nvidia_smi(*keys: str) -> dict[str, str]:
    """What nvidia-smi says of the first card; nothing where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ") if done.stdout else []
    return dict(zip(keys, values, strict=False))


def card_name(device: str) -> str:
    """The card's name, or the processor's."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(torch.device(device))
    return processor()


def slug(name: str) -> str:
    """A name as that of a folder: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def commit() -> str:
    """The commit of this checkout, with a plus where files differ from it; `unknown` where git cannot tell."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that a part is to work on; a card that is not there ends it in one line."""
    try:
        return pick_device(args.device)
    except UserError as error:
        sys.exit(f"error: --{error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a card's, or the machine's, word for no more memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# --- training and answering ------------------------------------------------------------------------------------------


def train_run(
    mode: str,
    source: Source,
    make: Callable[[], Start],
    out_dir: Path,
    method: MethodConfig | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """A run of training as the command makes it, from Python objects; the lines of its metrics.

    Args:
        method: the parts and their settings; None: those of the mode.
        options: of `RunConfig`.
    """
    settings = {key: value for key, value in vars(source).items() if not key.startswith("_")}
    target = f"{type(source).__module__}.{type(source).__qualname__}"
    rationale = "equations" if mode == "latent" else options.pop("rationale", "natural")
    run = RunConfig(
        mode=mode, model={}, data={"_target_": target, **plain(settings)}, tokenizer={},
        rationale=rationale, out_dir=str(out_dir), **options,
    )  # fmt: skip
    method = method or (MethodConfig.simcot() if mode == "latent" else MethodConfig())
    train(run, method, asdict(run) | asdict(method), lambda: source, lambda job: make())
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def plain(value: Any) -> Any:
    """Tuples as the lists that JSON has for them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def score(
    folder: Path, problems: Sequence[Problem], device: torch.device, dtype: torch.dtype, batch_size: int
) -> dict[str, Any]:
    """Accuracy of a checkpoint on problems, greedy, strict and by the last number, with 95% Wilson intervals."""
    checkpoint: Checkpoint = load_checkpoint(folder, device)
    questions = [problem.question for problem in problems]
    synchronise(device)
    began = time.perf_counter()
    with autocast(device, dtype):
        generations = generate_all(checkpoint, questions, batch_size)
    synchronise(device)
    seconds, n = time.perf_counter() - began, len(problems)
    pairs = list(zip(generations, problems, strict=True))
    strict = sum(same_number(g.answer, p.answer) for g, p in pairs)
    last = sum(same_number(last_number(g.text), p.answer) for g, p in pairs)
    return {
        "n": n,
        "accuracy": strict / n,
        "ci95": list(wilson_interval(strict, n)),
        "accuracy_last_number": last / n,
        "ci95_last_number": list(wilson_interval(last, n)),
        "tokens_per_answer": sum(g.n_tokens for g in generations) / n,
        "questions_per_s": n / seconds,
    }


def relative_error(ours: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, as a share of the largest expected number, or of `floor` where that is larger."""
    scale = max(expected.abs().max().item(), floor) if expected.numel() else 0.0
    difference = (ours.double().cpu() - expected.double().cpu()).abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale > 0 else difference
