"""The stages of the curricula in closed form: how many thoughts there are, and which steps are still written."""

from __future__ import annotations

from typing import Any

import pytest

from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.curricula.none import NoCurriculum
from simcot_latent.curricula.replace import Replace
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT, GPTConfig

WRITTEN, LAST = Stage(0, 0), Stage(8, None)
RUN = RunConfig(mode="", model={}, data={}, tokenizer={}, rationale="equations")
SHARES = [{"steps": 1, "share": 0.2}, {"steps": 3, "share": 0.3}]


@pytest.mark.parametrize(
    ("latent", "expected"),
    [
        ({"warmup": 0.0, "stages": 0}, {0.0: LAST, 1.0: LAST}),
        ({"warmup": 0.5, "stages": 0}, {0.0: WRITTEN, 0.499: WRITTEN, 0.5: LAST, 1.0: LAST}),
        (
            {"warmup": 0.1, "stages": 0.3},  # 1, 2 and 3 of the 4 steps, a tenth of training each
            {0.0: WRITTEN, 0.1: Stage(2, 1), 0.2: Stage(4, 2), 0.3: Stage(6, 3), 0.399: Stage(6, 3), 0.4: LAST},
        ),
        ({"warmup": 0.1, "stages": SHARES}, {0.099: WRITTEN, 0.1: Stage(2, 1), 0.3: Stage(6, 3), 0.6: LAST}),
        ({"warmup": 0.0, "stages": [{"steps": 4, "share": 0.5}]}, {0.0: LAST, 0.5: LAST}),
        (  # the last state of each stage is only decoded
            {"warmup": 0.1, "stages": SHARES, "n_latents": 7, "feeds_last": False},
            {0.0: WRITTEN, 0.1: Stage(1, 1), 0.3: Stage(5, 3), 0.6: Stage(7, None), 1.0: Stage(7, None)},
        ),
    ],
)
def test_thoughts_replace_steps_from_the_first_on(latent: dict[str, Any], expected: dict[float, Stage]) -> None:
    """Eight states, two a step: of a stage in which they replace s steps, step s + 1 is the first that is written."""
    settings: dict[str, Any] = {"n_latents": 8, "latents_per_step": 2} | latent
    curriculum = Replace(MethodConfig.simcot(LatentConfig(**settings)), RUN)
    assert {progress: curriculum.stage_at(progress) for progress in expected} == expected


def test_one_stage_is_the_last() -> None:
    latent = LatentConfig(n_latents=6, latents_per_step=2, warmup=0.5, stages=0.3)
    for progress in (0.0, 0.4, 0.9, 1.0):
        for loop, expected in (("pause", Stage(6, None)), ("none", WRITTEN)):
            method = MethodConfig.simcot(latent, curriculum="none", loop=loop)
            assert NoCurriculum(method, RUN).stage_at(progress) == expected


@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_row_of_too_many_thoughts_is_refused(row: int, tokenizer: Tokenizer, problems: list[Problem]) -> None:
    """Whichever row it is."""
    model = GPT(GPTConfig(tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=16))
    method = Method(model, tokenizer, RUN, MethodConfig.simcot(LatentConfig(n_latents=3)))
    examples = [method.encode(problem) for problem in problems]
    stages = [Stage(2, 2)] * len(examples)
    method.collate(examples, stages)
    stages[row] = Stage(4, None)
    with pytest.raises(UserError, match="must be one for each of 5 rows, of at most 3 thoughts each"):
        method.collate(examples, stages)
