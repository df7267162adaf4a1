"""compile=true: the same numbers, and no compilation anew for every length."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch._dynamo import utils as dynamo

from simcot_latent.model.gpt import FEW, GPT, Block
from simcot_latent.model.linear import gathered_gradients
from simcot_latent.model.packing import Packing
from simcot_latent.model.thoughts import go_on, think

LENGTHS = [[40, 50, 21], [33, 60, 60], [70, 41], [64, 1, 7, 30, 25], [30, 31, 32, 33]]


def losses_and_gradients(model: GPT) -> list[torch.Tensor]:
    """Of a written pass and of a thought loop for several batches, each of another size and length."""
    found: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        B = len(lengths)
        questions, texts = Packing.of([n - 1 for n in lengths], [1] * B), Packing.of([1] * B, lengths)
        ids_P = torch.randint(61, (sum(lengths),), generator=generator)
        model.zero_grad()
        written = model(ids_P, questions, read_out=B).sin().sum()
        with gathered_gradients(model):
            thoughts = think(model, model.embedding(ids_P), questions, 3, room=max(lengths))
            thought = go_on(model, thoughts, model.embedding(ids_P), texts).sin().sum()
        (written + thought).backward()
        found += [written.detach(), thought.detach()]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler to compile with")
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_two_graphs_whatever_the_lengths(make_model: Callable[..., GPT], family: str) -> None:
    model = make_model(family, context_length=256)
    eager = losses_and_gradients(model)
    torch._dynamo.reset()
    dynamo.counters.clear()
    for block in model.modules():
        if isinstance(block, Block):
            block.compile_parts()
    compiled = losses_and_gradients(model)
    assert all(sum(lengths) > FEW for lengths in LENGTHS), "else nothing would be compiled"
    assert dynamo.counters["stats"]["unique_graphs"] == 2, "one before attention, one after, for all blocks and lengths"
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
