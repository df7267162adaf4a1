"""loop=sequential with a projector: every thought of every row is the projection of a hidden state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simcot_latent.loops.sequential import Projector, Sequential, SequentialConfig
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing

QUESTIONS = [[7, 3, 22, 9, 41, 60], [5, 60], [60]]


def by_hand(projector: Projector, hidden: Tensor) -> Tensor:
    """Linear, GELU, Linear, LayerNorm, of PyTorch's own functions."""
    up, down, norm = projector.up, projector.down, projector.norm
    x = torch.nn.functional.gelu(hidden @ up.weight.T + up.bias) @ down.weight.T + down.bias
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


@pytest.mark.parametrize("feeds_last", [True, False])
@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 4, 2), (3, 0, 3)], ids=str)
def test_equals_a_naive_loop(
    model: GPT, randomise: Callable[..., None], counts: tuple[int, ...], feeds_last: bool
) -> None:
    """A whole new pass for each thought, row by row."""
    loop = Sequential(32, SequentialConfig(feeds_last, projector_width=24))
    randomise(loop)
    assert loop.projector is not None
    ids = [i for row in QUESTIONS for i in row[:-1]] + [row[-1] for row in QUESTIONS]
    packing = loop.pack_questions([len(row) - 1 for row in QUESTIONS], counts)
    assert isinstance(packing, Packing)
    found = loop.think(model, model.embedding(torch.tensor(ids)), packing, counts, room=1)
    unread: list[Tensor] = []
    for row, count in enumerate(counts):
        vectors = list(model.embedding(torch.tensor(QUESTIONS[row])))
        for k in range(count):
            hidden_TD = model.transformer(torch.stack(vectors)[None])[0]
            vectors.append(by_hand(loop.projector, hidden_TD[-1]))
            torch.testing.assert_close(found.latents[row, k], vectors[-1], atol=1e-4, rtol=1e-4)
        assert not found.latents[row, count:].any()
        unread += vectors[-1:] if count else []
    if feeds_last:
        assert found.unread_RD is not None
        torch.testing.assert_close(found.unread_RD, torch.stack(unread), atol=1e-4, rtol=1e-4)
    else:
        assert found.unread_RD is None


def test_it_starts_as_the_models_own_layers_do() -> None:
    """Linear weights of a standard deviation of 1 / sqrt(inputs), no biases, a norm that changes nothing."""
    torch.manual_seed(0)
    projector = Sequential(64, SequentialConfig(projector_width=400)).projector
    assert projector is not None
    assert projector.up.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert projector.down.weight.std().item() == pytest.approx(400**-0.5, rel=0.05)
    for zeros in (projector.up.bias, projector.down.bias, projector.norm.bias):
        assert not zeros.any()
    assert bool((projector.norm.weight == 1).all())
