"""What only a card can show: captured graphs, fused kernels, memory. `python -m benchmarks.gpu` runs these too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.generate import generate
from simcot_latent.loops.base import NoSettings, ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.cache import StaticCache, StaticCaches
from simcot_latent.model.gpt import GPT, set_block_options
from simcot_latent.model.linear import keep_weights_in
from simcot_latent.model.packing import Packing
from simcot_latent.training.optimizer import orthogonalise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LOOPS: dict[str, Callable[[], ThoughtLoop] | None] = {
    "writes": None,
    "thinks": lambda: Sequential(32, SequentialConfig()),
    "only decodes the last": lambda: Sequential(32, SequentialConfig(feeds_last=False, projector_width=24)),
    "pauses": lambda: Pause(32, NoSettings()),
}
QUESTIONS = ["Ann has 3 pears.", "2+2?", "How many legs has a dog, Joe?", "Why?", "Half of 30?"] * 5


@pytest.fixture
def make_checkpoint(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> Callable[[str, str], Checkpoint]:
    """`make_checkpoint(family, way)`: a small random model on the card that answers in a way of `LOOPS`."""

    def make(family: str, way: str) -> Checkpoint:
        model = make_model(family, vocab_size=tokenizer.n_vocab, context_length=48).cuda()
        make_loop = LOOPS[way]
        if make_loop is None:
            return Checkpoint(model, None, tokenizer, {})
        torch.manual_seed(0)
        return Checkpoint(
            model,
            None,
            tokenizer,
            {},
            answers=AnswerFormat(thinks=True),
            loop=make_loop().cuda().eval(),
            stage=Stage(4, first_written=None),
        )

    return make


@pytest.mark.parametrize("way", LOOPS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "nanochat"])
def test_graphs_answer_as_passes_do(make_checkpoint: Callable[[str, str], Checkpoint], family: str, way: str) -> None:
    checkpoint = make_checkpoint(family, way)
    caches = StaticCaches(checkpoint.model.config.context_length)
    for rows in (25, 7, 1, 25):
        wanted = generate(checkpoint, QUESTIONS[:rows], 20)
        assert generate(checkpoint, QUESTIONS[:rows], 20, caches=caches) == wanted


@torch.no_grad()
def test_a_pass_is_captured_once_and_replayed(make_model: Callable[..., GPT]) -> None:
    model = make_model("llama").cuda()
    static = StaticCache(rows=4, capacity=64, context_length=128)
    graphs = []
    for _ in range(2):
        static.begin()
        model(torch.zeros(6, dtype=torch.long, device="cuda"), Packing.grid(3, 2, torch.device("cuda")), static)
        for _ in range(3):
            one_each = Packing.grid(3, 1, torch.device("cuda"))
            model(torch.ones(3, dtype=torch.long, device="cuda"), one_each, static)
            graphs.append(static._graph)
    assert graphs[0] is not None
    assert all(graph is graphs[0] for graph in graphs)


@torch.no_grad()
def test_graphs_in_bfloat16_use_the_weights_that_were_kept(
    make_checkpoint: Callable[[str, str], Checkpoint],
) -> None:
    checkpoint = make_checkpoint("llama", "thinks")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        wanted = generate(checkpoint, QUESTIONS[:7], 1)
        keep_weights_in(checkpoint.model, torch.bfloat16)
        found = generate(checkpoint, QUESTIONS[:7], 1, caches=StaticCaches(48))
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.latents_KD is not None
        assert expected.latents_KD is not None
        torch.testing.assert_close(ours.latents_KD.float(), expected.latents_KD.float(), atol=0.05, rtol=0.05)


def test_fused_attention_on_the_card(make_model: Callable[..., GPT]) -> None:
    model = make_model("llama").cuda()
    ids_BT = torch.arange(24, device="cuda").reshape(2, 12)
    from simcot_latent.model.cache import KVCache

    def hidden() -> torch.Tensor:
        cache = KVCache(12)
        return torch.cat([model(ids_BT[:, :5], cache=cache), model(ids_BT[:, 5:], cache=cache)], dim=1)

    expected = hidden()
    set_block_options(model, later_attention="sdpa")
    torch.testing.assert_close(hidden(), expected, atol=1e-4, rtol=1e-4)


def test_orthogonal_to_bfloat16s_accuracy() -> None:
    x_NRC = torch.randn(3, 64, 32, device="cuda")
    singular = torch.linalg.svdvals(orthogonalise(x_NRC))
    assert 0.6 < singular.min().item() <= singular.max().item() < 1.3
