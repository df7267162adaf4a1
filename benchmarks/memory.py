"""python -m benchmarks.memory --data path/to/gsm8k: peak memory of a latent training step.

Ours against the same step in the usual way: questions, texts and steps padded to rectangles, logits at every position
of them, and one decoder call a step group. Each side runs in a process of its own, takes one step so that gradients
and moments exist, and then a second one, whose peak is what counts: of the whole process, and above what it held before
(weights, moments, libraries). `--compile` and `--activation-checkpointing` are for our side. On Linux, from /proc; on a
GPU, from PyTorch's allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import SIZES, add_block_options, load_problems, make_parser, report
from benchmarks.train_step import make_method, median_batch
from simcot_latent.batches import ThoughtBatch
from simcot_latent.data.batch import to_device
from simcot_latent.distributed import autocast, pick_device
from simcot_latent.method import Method
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import set_block_options
from simcot_latent.model.packing import Packing
from simcot_latent.terms.step_decoder import StepBatch
from simcot_latent.training.optimizer import make_optimizers, update

SIDES = ("ours", "padded")


def main() -> None:
    args = parse_arguments()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            sides = track(SIDES, f"{size}, batch {batch_size}", console=Console(stderr=True))
            found = {side: in_own_process(side, size, batch_size) for side in sides}
            rows.append(
                {"size": size, "batch_size": batch_size}
                | {f"{side}_{key}": value for side, values in found.items() for key, value in values.items()}
                | {f"ratio_{key}": found["ours"][key] / found["padded"][key] for key in found["ours"]}
            )
    table = Table("size", "batch", "peak, ours", "peak, padded", "ratio", "step, ours", "step, padded", "ratio")
    for row in rows:
        cells = [
            text
            for key in ("peak_mb", "step_mb")
            for text in (f"{row[f'ours_{key}']:.0f} MB", f"{row[f'padded_{key}']:.0f} MB", f"{row[f'ratio_{key}']:.2f}")
        ]
        table.add_row(row["size"], str(row["batch_size"]), *cells)
    report("memory", args, rows, table)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--thoughts", type=int, default=10)
    parser.add_argument("--latents-per-step", type=int, default=2)
    parser.add_argument("--decoder-layers", type=int, default=1)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_block_options(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.mode = "latent"
    return args


def in_own_process(side: str, size: str, batch_size: int) -> dict[str, float]:
    """What `measure` finds in a fresh process with this command's arguments."""
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--side", side]
    command += ["--sizes", size, "--batch-sizes", str(batch_size)]
    # What is freed goes back to the system at once, so that the peak is of what was in use and not of what was kept.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Megabytes at the peak of a step, in all and above what was held before it."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    method = make_method(args.sizes[0], args, device)
    if args.side == "ours":
        set_block_options(method, args.compile, args.activation_checkpointing)
    optimizers = make_optimizers(method, method.run)
    problems = load_problems(args.data, "train", 2048)
    batch = to_device(median_batch(method, problems, args.batch_sizes[0], args.seed)[0], device)
    totals = {key: value.to(device) for key, value in batch.totals.items()}
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: method(batch, totals)["loss"],
        "padded": lambda: padded_loss(method, batch),
    }
    memory = CudaMemory() if device.type == "cuda" else ProcessMemory()
    held = memory.reset()
    for _ in range(2):
        memory.reset()
        with autocast(device, getattr(torch, args.dtype)):
            loss = losses[args.side]()
        loss.backward()
        del loss
        update(method.parameters(), optimizers, max_norm=1.0)
    moments = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    held += sum(x.nbytes for x in moments) / 2**20
    return {"peak_mb": memory.peak(), "step_mb": memory.peak() - held}


def padded_loss(method: Method, batch: ThoughtBatch) -> Tensor:
    """The same losses (each a plain mean over its labels) with padding, full logits and a decoder call a group."""
    model, decoder, c = method.model, method.step_decoder, method.groups.latents_per_step
    assert decoder is not None
    K, taught = max(batch.counts), batch.terms["step"]
    assert isinstance(taught, StepBatch)
    questions = pad_sequence(split_rows(batch.question_ids_P, batch.questions), batch_first=True)
    texts = pad_sequence(list(batch.text_ids_A.split((batch.texts.length_B - 1).tolist())), batch_first=True)
    labels = pad_sequence(
        list(batch.targets.label_M.split((batch.texts.length_B - 1).tolist())), batch_first=True, padding_value=-100
    )
    T, A = questions.shape[1], texts.shape[1]
    cache = KVCache(T + K + A)
    # Thoughts of padded rows begin behind the padding, not behind <bot>: what matters here is how many there are.
    passes = [model.transformer(model.embedding(questions), cache=cache)]
    for _ in range(K - 1):
        passes.append(model.transformer(passes[-1][:, -1:], cache=cache))
    latents_BKD = torch.cat([hidden_BTD[:, -1:] for hidden_BTD in passes], dim=1)
    last_BAD = torch.cat((latents_BKD[:, -1:], model.embedding(texts)), dim=1)
    hidden_BSD = torch.cat([*passes, model.transformer(last_BAD, cache=cache)], dim=1)
    # Logits at every position, as the published code computes them.
    logits_BSV = model.logits(hidden_BSD)
    labels_BS = F.pad(labels, (T + K, 0), value=-100)
    loss = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=-100)
    groups_NCD = rearrange(latents_BKD, "b (g c) d -> (b g) c d", c=c)[taught.row_N]
    rows = taught.steps.packing.length_B - c
    steps = pad_sequence(list(taught.steps.ids_L.split(rows.tolist())), batch_first=True)
    group_N = taught.row_N % (K // c)
    for group in range(K // c):
        mine = group_N == group
        inputs = torch.cat((groups_NCD[mine], decoder.embedding(steps[mine])), dim=1)
        logits = decoder.logits(decoder.transformer(inputs))[:, c - 1 : -1]
        loss = loss + F.cross_entropy(logits.flatten(0, 1), steps[mine].flatten())
    return loss


def split_rows(ids_P: Tensor, packing: Packing) -> list[Tensor]:
    """Packed token ids as one tensor a row."""
    return [ids_P[packing.row_P == row] for row in range(packing.rows)]


class ProcessMemory:
    """Megabytes of this process, as Linux counts them."""

    def reset(self) -> float:
        """Forgets the peak so far; what is held now."""
        Path("/proc/self/clear_refs").write_text("5")
        return self._read("VmRSS")

    def peak(self) -> float:
        return self._read("VmHWM")

    def _read(self, key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


class CudaMemory:
    """Megabytes that PyTorch holds on the GPU."""

    def reset(self) -> float:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
