"""steps=own_head: which positions are to say which tokens of the steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.own_head import OwnHeadBatch


@pytest.mark.parametrize("c", [2, 12])
def test_a_step_stays_within_its_group(
    c: int, make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer,
    problems: list[Problem],
) -> None:  # fmt: skip
    """Two groups: one that is too short for its step says as many tokens as it has positions, and the end token only
    where there is room for it. In the public code of LOTUS it would go on in the next group's positions."""
    model = make_model("llama", vocab_size=tokenizer.n_vocab, context_length=256)
    latent = LatentConfig(n_latents=2 * c, latents_per_step=c, missing="mask", warmup=0.0, surplus="drop")
    config = MethodConfig.simcot(latent, curriculum="none", loop="looped", steps="own_head")
    method = Method(model, tokenizer, make_run(rationale="equations"), config)
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    found = batch.terms["step"]
    assert isinstance(found, OwnHeadBatch)
    expected = {
        row * (1 + 2 * c) + group * c + j: token
        for row, example in enumerate(examples)
        for group, step in enumerate(example.steps[:2])
        for j, token in enumerate([*step.ids, tokenizer.end_id][:c])
    }
    assert len(set(found.index_M.tolist())) == len(found.index_M)
    assert dict(zip(found.index_M.tolist(), found.label_M.tolist(), strict=True)) == expected
