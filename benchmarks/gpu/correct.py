"""python -m benchmarks.gpu.correct: are the numbers on the card those of the CPU?

In float32, without TF32, losses and every gradient must be the CPU's to 1e-4 of the largest number of each tensor (of
a thousandth of the largest of all, where a tensor's own are smaller). In bfloat16 the loss must be within 2% and the
whole gradient within an angle of cosine 0.99 of float32's. What only changes how a number is computed (activation
checkpointing, `compile`, `compile_thoughts`, `later_attention=sdpa`) must change none on the card, to 1e-4.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.common import Report, device_of, parse_part, read_report, relative_error, train_run
from simcot_latent.checkpoint import load_checkpoint
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.data.batch import to_device
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import default_tokenizer
from simcot_latent.distributed import autocast
from simcot_latent.generate import generate_all
from simcot_latent.method import Method
from simcot_latent.model.cache import StaticCaches
from simcot_latent.model.gpt import GPT, GPTConfig, set_block_options
from simcot_latent.training import optimizer
from simcot_latent.training.setup import Start

FLOAT32, LOSS_IN_BFLOAT16, COSINE_IN_BFLOAT16 = 1e-4, 0.02, 0.99
GOLDEN_TOLERANCE = 1e-3
"""Of 30 steps: rounding of one step is the next one's input."""

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")

FAMILIES = {
    "gpt2": GPTConfig(2048, positions="learned", activation="gelu_tanh", bias=True),
    "llama": GPTConfig(2048, norm="rmsnorm", activation="swiglu", n_kv_head=2, ffn_width=352),
    "nanochat": GPTConfig(
        2048, norm="rmsnorm", norm_scale=False, activation="relu2", qk_norm=True, logit_softcap=15.0, tie_head=False
    ),
}
"""Between them they use what the families differ in."""


def main() -> None:
    args = parse_part(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what deterministic kernels ask for, before the first of all
    device = device_of(args)
    report = Report("correct", args, bounds={"float32": FLOAT32, "bfloat16 loss": LOSS_IN_BFLOAT16,
                    "bfloat16 cosine": COSINE_IN_BFLOAT16, "golden": GOLDEN_TOLERANCE})  # fmt: skip
    problems = Arithmetic(train_size=64).load("train").problems
    checks = all_checks(device, problems, tiny=args.tiny)
    failed: list[str] = []
    for i, (name, check) in enumerate(checks):
        if report.seconds_left < 5:
            for left, _ in checks[i:]:
                report.leave_out(left, "no time left")
            break
        try:
            found = check()
        except Exception as error:  # one check that cannot run must not keep the others from running
            found = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        report.add(check=name, **found)
        if not found["ok"]:
            failed.append(name)
    report.headline(f"{len(read_report(report.out, report.part)['rows']) - len(failed)} checks hold")
    if failed:
        report.headline(f"{len(failed)} do not: {', '.join(failed)}")
        sys.exit(f"{len(failed)} checks do not hold: {', '.join(failed)}")


def all_checks(
    device: torch.device, problems: Sequence[Problem], tiny: bool
) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The checks by name, the most telling first; each gives `ok` and what it measured."""
    checks: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    counts = (1, 3) if tiny else (1, 2, 3, 4, 6, 10)
    families = {"llama": FAMILIES["llama"]} if tiny else FAMILIES
    for family, config in families.items():
        modes: dict[str, Callable[[], Method]] = {"weighted": partial(make_method, config, None)}
        modes |= {f"{n} thoughts": partial(make_method, config, n) for n in counts}
        modes["3 pauses"] = partial(make_method, config, 3, loop="pause")
        for mode, make in modes.items():
            checks.append((f"float32, {family}, {mode}", partial(same_as_cpu, make, problems, device)))
    config = FAMILIES["llama"]
    three = partial(make_method, config, 3)
    checks += [
        ("bfloat16, 3 thoughts", partial(bfloat16_is_close, three, problems, device)),
        ("bfloat16, weighted", partial(bfloat16_is_close, partial(make_method, config, None), problems, device)),
        ("activation checkpointing", partial(option_changes_nothing, three, problems, device, checkpointing=True)),
        ("later_attention=sdpa", partial(option_changes_nothing, three, problems, device, later_attention="sdpa")),
        ("answers at batch 1, 7, 64", partial(same_answers, config, problems, device)),
        ("golden curve, weighted", partial(golden_curve, "weighted", device)),
        ("golden curve, latent", partial(golden_curve, "latent", device)),
        ("resumed equals uninterrupted", partial(resumed_is_equal, device, 4 if tiny else 10)),
        ("one rank of a process group", partial(one_rank_is_equal, three, problems, device)),
        ("compile=true", partial(option_changes_nothing, three, problems, device, compile=True)),
    ]
    if device.type == "cuda":
        checks.append(
            ("compile_thoughts=true", partial(option_changes_nothing, three, problems, device, compile_thoughts=True))
        )
    checks.append(("tests marked gpu", partial(marked_tests, device)))
    return checks


def make_method(config: GPTConfig, n_latents: int | None, **parts: Any) -> Method:
    """A small random model and the method that trains it; None: mode=weighted. `parts`: in place of mode=latent's."""
    torch.manual_seed(0)
    model, tokenizer = GPT(config), default_tokenizer()
    rationale = "natural" if n_latents is None else "equations"
    run = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale=rationale)
    if n_latents is None:
        return Method(model, tokenizer, run, MethodConfig())
    latent = LatentConfig(n_latents, warmup=0.0, stages=0)
    return Method(model, tokenizer, run, MethodConfig.simcot(latent, **parts))


def numbers(
    method: Method, problems: Sequence[Problem], device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Losses and the gradient of every parameter, by name, of a ragged batch of 12 problems."""
    method.to(device)
    batch = method.collate([method.encode(problem) for problem in problems[:12]], method.last_stage)
    totals = {key: value.to(device) for key, value in batch.totals.items()}

    def step() -> dict[str, Tensor]:
        method.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, dtype):
            shares = method(to_device(batch, device), totals)
        shares["loss"].backward()
        return shares

    step()
    shares = step()  # what was compiled or captured the first time is used the second time
    found = {name: value.detach().clone() for name, value in shares.items()}
    found |= {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    return {name: value.float().cpu() for name, value in found.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = FLOAT32) -> dict[str, Any]:
    """The number that differs most, against the bound; a gradient that only one side has is none."""
    if found.keys() != expected.keys():
        return {"ok": False, "only_one_has": sorted(found.keys() ^ expected.keys())}
    floor = 1e-3 * max(value.abs().max().item() for value in expected.values() if value.numel())
    errors = {name: relative_error(found[name], expected[name], floor) for name in expected}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return {"ok": errors[worst] < bound, "worst": worst, "relative_error": errors[worst], "tensors": len(errors)}


def same_as_cpu(make: Callable[[], Method], problems: Sequence[Problem], device: torch.device) -> dict[str, Any]:
    return compare(numbers(make(), problems, device), numbers(make(), problems, CPU))


def bfloat16_is_close(make: Callable[[], Method], problems: Sequence[Problem], device: torch.device) -> dict[str, Any]:
    ours, exact = numbers(make(), problems, device, torch.bfloat16), numbers(make(), problems, device)
    loss = relative_error(ours["loss"], exact["loss"])
    flat = [torch.cat([value.double().flatten() for name, value in x.items() if "." in name]) for x in (ours, exact)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0).item()
    return {"ok": loss < LOSS_IN_BFLOAT16 and cosine > COSINE_IN_BFLOAT16, "loss_error": loss, "cosine": cosine}


def option_changes_nothing(
    make: Callable[[], Method], problems: Sequence[Problem], device: torch.device, **options: Any
) -> dict[str, Any]:
    changed = make()
    set_block_options(changed, **options)
    return compare(numbers(changed, problems, device), numbers(make(), problems, device))


def same_answers(config: GPTConfig, problems: Sequence[Problem], device: torch.device) -> dict[str, Any]:
    """Greedy answers in float32 at batch 1, 7 and 64, with and without static caches, against the CPU's at batch 64."""
    questions = [problem.question for problem in problems[:64]]
    with tempfile.TemporaryDirectory() as folder:
        # A model that has learnt to answer, so that no two tokens are likely to within rounding.
        source = Arithmetic(train_size=2048, validation_size=8)
        train_quietly("latent", source, Path(folder) / "run", CPU, num_iterations=40, eval_every=-1, eval_examples=8)
        here, there = (load_checkpoint(Path(folder) / "run", d) for d in (CPU, device))
    there.model.to(device)
    wanted = [g.text for g in generate_all(here, questions, 64, max_new_tokens=24)]
    caches = StaticCaches(config.context_length)
    ways: dict[str, tuple[int, StaticCaches | None]] = {f"batch {n}": (n, None) for n in (1, 7, 64)}
    ways |= {"batch 7, cuda_graphs": (7, caches), "batch 64, cuda_graphs": (64, caches)}
    different = {
        way: sum(
            g.text != text for g, text in zip(generate_all(there, questions, n, 24, caches=c), wanted, strict=True)
        )
        for way, (n, c) in ways.items()
    }
    return {"ok": not any(different.values()), "answers": len(questions), "different": different}


def train_quietly(
    mode: str, source: Arithmetic, out_dir: Path, device: torch.device, **options: Any
) -> list[dict[str, Any]]:
    """A run of the embedded problems with the model of `model=tiny`, in float32."""
    own = {name: options.pop(name) for name in ("n_latents", "missing", "warmup", "stages") if name in options}
    method = MethodConfig.simcot(LatentConfig(**own)) if mode == "latent" else MethodConfig()
    defaults = {"device": str(device), "dtype": "float32", "log_every": 1, "max_new_tokens": 8}

    def make() -> Start:
        return Start(GPT(GPTConfig(2048, n_layer=2, n_head=8, n_embd=128)), default_tokenizer())

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # the report says what came of it
        return train_run(mode, source, make, out_dir, method, **(defaults | options))


def golden_curve(mode: str, device: torch.device) -> dict[str, Any]:
    """The recorded losses of tests/end_to_end/golden, which a run on the CPU gave, are those of this device."""
    file = REPOSITORY / "tests" / "end_to_end" / "golden" / f"{mode}.jsonl"
    recorded = [json.loads(line) for line in file.read_text().splitlines()]
    format_on_gpu, optimizer.NEWTON_SCHULZ_ON_GPU = optimizer.NEWTON_SCHULZ_ON_GPU, torch.float32
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = train_quietly(
                mode, Arithmetic(train_size=512, validation_size=8), Path(folder) / "run", device,
                num_iterations=30, device_batch_size=16, eval_every=-1, eval_examples=8,
                # What they were recorded with, as in tests/end_to_end/test_golden_curves.py.
                learning_rate=3e-3, matrix_lr=0.02, n_latents=4, missing="mask", warmup=0.2, stages=0.3,
            )  # fmt: skip
    finally:
        optimizer.NEWTON_SCHULZ_ON_GPU = format_on_gpu
    found = [row for row in rows if "loss" in row]
    errors = [
        abs(row[key] - wanted[key]) / max(abs(wanted[key]), 1e-3)
        for row, wanted in zip(found, recorded, strict=True)
        for key in wanted.keys() - {"step"}
    ]
    return {"ok": max(errors) < GOLDEN_TOLERANCE, "relative_error": max(errors), "steps": len(found)}


def resumed_is_equal(device: torch.device, steps: int) -> dict[str, Any]:
    """A run that is stopped halfway and resumed ends with the weights of one that was not, bit for bit.

    With PyTorch's deterministic kernels: without them no two runs on a GPU are equal.
    """
    source = Arithmetic(train_size=512, validation_size=8)
    options: dict[str, Any] = {
        "num_iterations": steps,
        "eval_every": -1,
        "eval_examples": 8,
        "warmup": 0.2,
        "stages": 0.2,
    }
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
            whole, halves = Path(folder) / "whole", Path(folder) / "halves"
            train_quietly("latent", source, whole, device, **options)
            train_quietly("latent", source, halves, device, checkpoint_every=steps // 2, keep_checkpoints=2, **options)
            (halves / "latest").unlink()
            (halves / "latest").symlink_to(f"step_{steps // 2:07d}")
            train_quietly("latent", source, halves, device, resume=True, **options)
            ours, expected = (load_checkpoint(x).model.state_dict() for x in (halves, whole))
            different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    finally:
        torch.use_deterministic_algorithms(False)
    return {"ok": not different, "tensors": len(expected), "different": different}


def one_rank_is_equal(make: Callable[[], Method], problems: Sequence[Problem], device: torch.device) -> dict[str, Any]:
    """Under DDP, in a group of one rank (NCCL on a GPU), gradients are those without."""
    wanted = numbers(make(), problems, device)
    method = make().to(device)
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        device_id, store = (device if device.type == "cuda" else None), f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1, device_id=device_id)
        try:
            module = DistributedDataParallel(method)
            batch = method.collate([method.encode(p) for p in problems[:12]], method.last_stage)
            totals = {key: value.to(device) for key, value in batch.totals.items()}
            shares = module(to_device(batch, device), totals)
            shares["loss"].backward()
            found = {name: value.detach().cpu() for name, value in shares.items()}
            found |= {n: p.grad.clone().float().cpu() for n, p in method.named_parameters() if p.grad is not None}
        finally:
            dist.destroy_process_group()
    return compare(found, wanted)


def marked_tests(device: torch.device) -> dict[str, Any]:
    """The tests that are marked `gpu`; where pytest is not installed they are left out, which is said."""
    if find_spec("pytest") is None:
        return {"ok": True, "left_out": "pytest is not installed"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-o",
        "addopts=",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    # Without a card all of them are skipped, which is no failure; 5: there are none.
    return {"ok": done.returncode == 0, "status": done.returncode, "last_line": lines[-1] if lines else ""}


if __name__ == "__main__":
    main()
