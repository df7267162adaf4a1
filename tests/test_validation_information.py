"""What validation says that thoughts hold: V-information, as the probe measures it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import simcot_latent as sl
from simcot_latent.checkpoint import Checkpoint
from simcot_latent.config import RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.distributed import Ranks
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.probing.steps import probe_problems
from simcot_latent.probing.summary import summarise
from simcot_latent.terms.step_decoder import StepDecoder
from simcot_latent.training.validation import thought_v_information


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[..., GPT], randomise: Callable[..., None], tokenizer: Tokenizer) -> Checkpoint:
    """Random weights, three thoughts."""
    model = make_model("llama", seed=9, vocab_size=tokenizer.n_vocab, context_length=256)
    decoder = StepDecoder.from_base(model, 1, "random")
    randomise(decoder.transformer, seed=1)
    return Checkpoint(
        model,
        decoder.eval(),
        tokenizer,
        {"max_new_tokens": 2},
        answers=AnswerFormat(thinks=True),
        loop=Sequential(32, SequentialConfig()),
        stage=Stage(3, first_written=None),
        path=Path("runs/x"),
    )


@pytest.fixture(scope="module")
def many(problems: list[Problem]) -> list[Problem]:
    """40 problems, as many different questions."""
    return [replace(problems[i % 5], question=f"{problems[i % 5].question} Say {i}.") for i in range(40)]


class OneOfTwo(Ranks):
    """A rank of two that is alone here: what it would have sent is kept."""

    sent: list[Tensor]

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.sent.extend(values.values())
        return values


def test_v_information_at_validation_is_the_probes(
    checkpoint: Checkpoint, many: list[Problem], make_run: Callable[..., RunConfig]
) -> None:
    """Of the first 32 problems, each scored with the thoughts of all of these; in batches of any size, on any ranks."""
    latents_NKD = sl.think(checkpoint, [problem.question for problem in many]).latents
    probed = summarise(probe_problems(checkpoint, many[:32]))["all"]
    assert abs(probed["v_information"]) > 1e-3, "nothing is proven"
    for size in (1, 7, 128):
        run = make_run(eval_batch_size=size)
        found = thought_v_information(checkpoint, many, latents_NKD, run, Ranks())
        assert found["thought_v_information"] == pytest.approx(probed["v_information"], rel=1e-3, abs=1e-5)
        assert found["thought_v_information_bound"] == pytest.approx(probed["v_information_bound"])
        assert found["thought_v_information_bound"] < 5
    parts: list[Tensor] = []
    for rank in range(2):
        ranks = OneOfTwo(rank, 2)
        object.__setattr__(ranks, "sent", [])
        thought_v_information(checkpoint, many, latents_NKD, run, ranks)
        parts += ranks.sent
    count, total, bound = torch.stack(parts).sum(0).tolist()
    assert count == probed["n"], "each step is scored on one rank"
    assert total / count == pytest.approx(found["thought_v_information"], rel=1e-4, abs=1e-6)
    assert bound / count == pytest.approx(found["thought_v_information_bound"])


def test_no_v_information_where_no_two_problems_have_a_step(
    checkpoint: Checkpoint, problems: list[Problem], make_run: Callable[..., RunConfig]
) -> None:
    latents_NKD = sl.think(checkpoint, [problem.question for problem in problems[:2]]).latents
    found = thought_v_information(checkpoint, problems[:2], latents_NKD, make_run(), Ranks())
    assert all(math.isnan(value) for value in found.values())
