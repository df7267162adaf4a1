"""How long it takes to save a checkpoint with its manifest of hashes, beside the same without.

Command: python -m benchmarks.save [--folder DIR] [--repeats N]

The model is of SmolLM2-135M's size, with random float32 weights and AdamW's two moments: 1.6 GB. Without hashes,
safetensors' own writer writes the files. Both ways are timed in turn, files synced to the disk as training does it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from simcot_latent import checkpoint as module
from simcot_latent import weights
from simcot_latent.checkpoint import Checkpoint, TrainerState, load_checkpoint
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.folders import Fingerprint
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.training.saving import save_checkpoint

SMOLLM2_135M = {
    "context_length": 2048, "n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "ffn_width": 1536,
    "norm": "rmsnorm", "activation": "swiglu",
}  # fmt: skip


def without_hash(tensors: Mapping[str, Tensor], file: Path) -> Fingerprint:
    """As it was before there were hashes."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    return Fingerprint(0, "")


def nothing(file: Path) -> Fingerprint:
    return Fingerprint(0, "")


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tokenizer = default_tokenizer().filled_up_to(49_152)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **SMOLLM2_135M))
    checkpoint = Checkpoint(model, None, tokenizer, {"max_new_tokens": 256}, step=1)
    moments = {f"optimizer/{n}/{key}": torch.randn_like(p) for n, p in model.named_parameters()
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    state = TrainerState(moments, {"step": 1, "num_steps": 2})
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    seconds: dict[str, list[float]] = {"without": [], "with": [], "load, not verified": [], "load, verified": []}
    try:
        for _ in range(options.repeats):
            os.sync()
            with (
                patch.object(weights, "save_tensors", without_hash),
                patch.object(module, "save_tensors", without_hash),
                patch.object(module, "fingerprint", nothing),
            ):
                seconds["without"].append(timed(lambda: save_checkpoint(checkpoint, folder / "without", state, keep=1)))
            shutil.rmtree(folder / "without")
            os.sync()
            seconds["with"].append(timed(lambda: save_checkpoint(checkpoint, folder / "with", state, keep=1)))
            read = folder / "with" / "step_0000001"
            for verify, name in ((False, "load, not verified"), (True, "load, verified")):
                seconds[name].append(timed(partial(load_checkpoint, read, verify=verify)))
            shutil.rmtree(folder / "with")
    finally:
        shutil.rmtree(folder)
    for name, times in seconds.items():
        print(f"{name}: median {statistics.median(times):.2f} s of {', '.join(f'{t:.2f}' for t in times)}")
    print(
        f"saving with hashes takes {statistics.median(seconds['with']) / statistics.median(seconds['without']):.2f} x"
    )


if __name__ == "__main__":
    main()
