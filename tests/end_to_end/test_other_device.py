"""Training, evals and probe on another device: no operation between it and the CPU, the same numbers, no waiting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ARITHMETIC, PROBE, TINY, TRAIN, predictions_of, read_lines, report_in, run
from pretend_device import DEVICE, pretend_device

from simcot_latent.config import DecoderConfig, LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.data.batch import to_device
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, GPTConfig, set_block_options
from simcot_latent.training.optimizer import make_optimizers, update

SHORT = ("num_iterations=4", "eval_every=2", "max_new_tokens=3", "eval_examples=6", "checkpoint_every=2")

METHODS = {
    "weighted": MethodConfig(),
    "latent": MethodConfig.simcot(LatentConfig(projector_width=8)),
    "pairs": MethodConfig.simcot(
        LatentConfig(4, 2, missing="answer", projector_width=8), loss=LossConfig(step_reduction="codi")
    ),
    "decoder_of_base": MethodConfig.simcot(
        LatentConfig(3, 2, feeds_last=False, projector_width=8), DecoderConfig(None, "base")
    ),
    "pause": MethodConfig.simcot(curriculum="none", loop="pause"),
    "no_decoder": MethodConfig.simcot(steps="none"),
}


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretend_device() as device:
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        assert device.reads == []
        assert (there * torch.tensor(2.0) + there.new_ones(3)).tolist() == [3.0, 3.0, 3.0]
        assert len(device.reads) == 1
        with pytest.raises(RuntimeError, match="two devices"):
            _ = here + there
        with pytest.raises(RuntimeError, match="two devices"):
            there[torch.tensor([0, 2])]
        assert there.sum().item() == 3.0
        assert bool((there == 1).all())
        there[[0, 2]] = 5.0
        assert there.cpu().tolist() == [5.0, 1.0, 5.0]
        assert len(device.reads) == 4
        assert there[there > 2].shape == (2,)
        assert len(device.reads) == 5


@pytest.fixture(params=METHODS)
def make_method(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, make_run: Callable[..., RunConfig]
) -> Callable[[], Method]:
    """A new method, the same each time."""

    def make() -> Method:
        torch.manual_seed(0)
        family: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 256}
        if request.param != "weighted":
            family |= {"positions": "learned", "bias": True}
        rationale = "natural" if request.param == "weighted" else "equations"
        model = GPT(GPTConfig(tokenizer.n_vocab, **family))
        return Method(model, tokenizer, make_run(rationale=rationale), METHODS[request.param])

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_reads_nothing(
    make_method: Callable[[], Method], problems: list[Problem], optimizer: str, checkpointing: bool
) -> None:
    """A training step never waits for its device, and comes to the same losses and gradient norms there."""

    def losses(device: torch.device) -> list[torch.Tensor]:
        method = make_method()
        method.run.optimizer = optimizer
        set_block_options(method, compile=False, checkpointing=checkpointing)
        method.to(device)
        optimizers = make_optimizers(method, method.run)
        batch = method.collate([method.encode(problem) for problem in problems], method.last_stage)
        totals = {key: value.to(device) for key, value in batch.totals.items()}
        found: list[torch.Tensor] = []
        for _ in range(2):
            shares = method(to_device(batch, device), totals)
            shares["loss"].backward()
            found += [shares["loss"].detach(), update(method.parameters(), optimizers, max_norm=1.0)]
        return found

    expected = losses(torch.device("cpu"))
    with pretend_device() as device:
        ours = losses(DEVICE)
        assert device.reads == []
        assert [value.item() for value in ours] == pytest.approx([value.item() for value in expected], rel=1e-4)


@pytest.mark.parametrize("mode", ["latent", "weighted"])
def test_commands(mode: str, tmp_path: Path) -> None:
    """Training, going on with it, evaluation and probe: the numbers of a CPU."""
    arguments = [f"mode={mode}", *(a for a in TINY if not a.startswith("device=")), *ARITHMETIC, *SHORT]

    def commands(name: str, device: str) -> tuple[list[dict[str, float]], list[dict[str, Any]], str]:
        def command(module: str, *more: str) -> None:
            run(module, f"device={device}", *more, folder=tmp_path).ok()

        out_dir = tmp_path / name
        command(TRAIN, *arguments, f"out_dir={out_dir}")
        (out_dir / "latest").unlink()
        (out_dir / "latest").symlink_to("step_0000002")
        command(TRAIN, *arguments, f"out_dir={out_dir}", "resume=true")
        command("evals.arithmetic", f"ckpt={out_dir}", "max_new_tokens=3")
        if mode == "latent":
            command(PROBE, f"ckpt={out_dir}", "question=What is 3 plus 4?")
            command(PROBE, f"ckpt={out_dir}", "data=arithmetic", "limit=4")
        metrics = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        evals = out_dir / "evals"
        report = report_in(evals, "arithmetic.test")
        return metrics, read_lines(predictions_of(report)), json.loads(report.read_text())["device"]

    expected, expected_predictions, _ = commands("cpu", "cpu")
    with pretend_device():
        metrics, predictions, evaluated_on = commands("pretended", "auto")
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"tokens_per_s", "data_wait"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-3, nan_ok=True), key
    assert evaluated_on == str(DEVICE)
    # Attention is another kernel there: rounding may turn one answer of the twelve, whose words all but tie.
    assert len(predictions) == len(expected_predictions) == 12
    assert sum(ours != theirs for ours, theirs in zip(predictions, expected_predictions, strict=True)) <= 1
