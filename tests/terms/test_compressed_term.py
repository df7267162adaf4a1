"""steps=compressed: what is to be predicted, what is drawn for it, and what it costs, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import LatentConfig, LossConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.batch import Seeds
from simcot_latent.data.format import Example, concatenate, untagged
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.loops.compressed import Compressed
from simcot_latent.loops.given import GivenThoughts
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.terms.base import Trace
from simcot_latent.terms.compressed import CompressedBatch

STEPS = [[[101, 102, 103, 104], [105]], [[111, 112]], []]


def example(steps: list[list[int]]) -> Example:
    its = [untagged(step) for step in steps]
    return Example([3, 4, 5, 60], concatenate(its), its, untagged([7, 8, 9]), 1)


EXAMPLES = [example(steps) for steps in STEPS]


@pytest.fixture
def make_method(
    make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer
) -> Callable[..., Method]:
    def make(compressions: tuple[int, ...] = (2,), step_weight: float = 1.0, **own: Any) -> Method:
        config = MethodConfig(
            loop="compressed",
            steps="compressed",
            latent=LatentConfig(n_latents=8),
            loss=LossConfig(step_weight=step_weight),
            own={"compressions": list(compressions), "compression": compressions[-1], **own},
        )
        model = make_model("llama", vocab_size=tokenizer.n_vocab)
        method = Method(model, tokenizer, make_run(rationale="equations", step_weight_multiplier=1.0), config).eval()
        method.newline = untagged([])  # nothing stands between the steps of these examples
        return method

    return make


def collate(
    method: Method, examples: list[Example], seeds: Seeds | None = None
) -> tuple[ThoughtBatch, CompressedBatch]:
    batch = method.collate(examples, method.last_stage, seeds)
    assert isinstance(batch, ThoughtBatch)
    return batch, batch.terms["step"]


def test_what_is_predicted_where(make_method: Callable[..., Method], tokenizer: Tokenizer) -> None:
    """Without draws: the first token of each thought; `<|bot|>` at the speeds, `<|eot|>` at each row's last."""
    batch, term = collate(make_method(), EXAMPLES)
    bot, eot = tokenizer.bot_id, tokenizer.eot_id
    assert batch.counts == (3, 1, 0)
    at_speeds, at_bots, at_thoughts = [bot, bot, bot], [101, 111, eot], [103, 105, eot, eot]
    assert term.label_M.tolist() == at_speeds + at_bots + at_thoughts
    # The next of the B * K = 9 thoughts; 9: <|eot|>.
    assert term.next_S.tolist() == [0, 3, 9, 1, 2, 9, 9]
    assert term.noise_SD is None
    assert batch.totals["predictions"] == 7
    assert batch.totals["weights"] == len(term.label_M) + 3 * 3  # the answers' tokens
    assert batch.totals["tokens"] == 3 * 3
    # Questions with speeds and thoughts; <|eot|> and the answers without their last tokens.
    assert batch.totals["positions"] == 3 * 5 + 4 + 3 * 3


def test_tokens_are_drawn_from_each_thought(make_method: Callable[..., Method]) -> None:
    """Each of its tokens as often as the others, by the row's own seed."""
    method, found = make_method((3,)), []
    for seed in range(600):
        _, term = collate(method, EXAMPLES, Seeds(0, [seed, 7, 8]))
        found.append(tuple(term.label_M.tolist()))
    first = [labels[3] for labels in found]
    for token in (101, 102, 103):
        assert first.count(token) == pytest.approx(200, abs=50)
    second = [labels[6] for labels in found]
    for token in (104, 105):
        assert second.count(token) == pytest.approx(300, abs=60)
    # The other rows' labels stay what they are.
    assert len({labels[4] for labels in found}) == 1


@pytest.mark.parametrize("row", range(3))
def test_a_rows_draws_are_the_same_in_any_company(make_method: Callable[..., Method], row: int) -> None:
    method = make_method()
    _, together = collate(method, EXAMPLES, Seeds(5, [21, 22, 23]))
    batch, alone = collate(method, [EXAMPLES[row]], Seeds(5, [21 + row]))
    assert together.noise_SD is not None
    assert alone.noise_SD is not None
    n, before = batch.counts[0], 3 + sum((3, 1, 0)[:row])
    mine = [row, *range(before, before + n)]
    assert torch.equal(together.noise_SD[mine], alone.noise_SD)
    assert together.label_M[[row, *(3 + i for i in mine)]].tolist() == alone.label_M.tolist()


def test_noise_is_standard_normal(make_method: Callable[..., Method]) -> None:
    _, term = collate(make_method((1,)), EXAMPLES * 40, Seeds(5, list(range(120))))
    assert term.noise_SD is not None
    assert term.noise_SD.mean().item() == pytest.approx(0, abs=0.03)
    assert term.noise_SD.std().item() == pytest.approx(1, abs=0.03)
    assert len(set(term.noise_SD.flatten().tolist())) > 0.99 * term.noise_SD.numel()


@pytest.mark.parametrize("distance", ["mse", "nll"])
@pytest.mark.parametrize("std", [None, 0.3])
def test_the_loss_by_hand(make_method: Callable[..., Method], distance: str, std: float | None) -> None:
    """Embeddings of the next inputs, detached, in units of the embeddings' deviation; tokens by their logits."""
    method = make_method(embedding_distance=distance, embedding_std=std, embedding_weight=0.5)
    batch, term_batch = collate(method, EXAMPLES, Seeds(5, [21, 22, 23]))
    model, loop, term = method.model, method.loop, method.terms["step"]
    assert isinstance(loop, Compressed)
    generator = torch.Generator().manual_seed(0)
    states_MD = torch.randn(10, 32, generator=generator, requires_grad=True)
    latents_BKD = torch.randn(3, 3, 32, generator=generator, requires_grad=True)
    thoughts = GivenThoughts(latents_BKD, cache=None, states_MD=states_MD)  # type: ignore[arg-type]
    trace = Trace(loop, thoughts, batch.counts, hidden_AD=torch.empty(0, 32))
    totals = {"predictions": torch.tensor(14.0), "weights": torch.tensor(40.0)}  # of two such batches
    found = term.loss(trace, term_batch, None, totals)

    eot_D = model.embedding.weight[method.tokenizer.eot_id]
    x = latents_BKD.detach()
    nexts = torch.stack([x[0, 0], x[1, 0], eot_D, x[0, 1], x[0, 2], eot_D, eot_D]).detach()
    nexts = nexts / (model.embedding.weight.std() if std is None else std)
    mean_SD, log_std_SD = loop.head(states_MD[3:])
    normal = torch.distributions.Normal(mean_SD, log_std_SD.exp())
    if distance == "mse":
        assert term_batch.noise_SD is not None
        away_SD = (mean_SD + normal.stddev * term_batch.noise_SD - nexts).square()
    else:
        away_SD = -normal.log_prob(nexts)
    embeddings = away_SD.mean(-1).sum() / 14
    assert found.value is not None
    torch.testing.assert_close(found.value, 0.5 * embeddings)

    assert found.labelled is not None
    assert found.labelled.hidden_MD is states_MD
    assert torch.equal(found.labelled.scale_M, torch.full((10,), 1 / 40))
    assert found.metrics is not None
    metrics = found.metrics(torch.arange(10.0), torch.ones(10, dtype=torch.bool))
    torch.testing.assert_close(metrics["token_loss"], torch.tensor(45 / 40))
    torch.testing.assert_close(metrics["embedding_loss"], embeddings.detach())
    torch.testing.assert_close(metrics["thought_entropy"], normal.entropy().mean(-1).sum().detach() / 14)
    assert not metrics["embedding_loss"].requires_grad

    found.value.backward()
    assert latents_BKD.grad is None
    assert model.embedding.weight.grad is None  # what is to be predicted is not pulled
    assert states_MD.grad is not None
    assert not states_MD.grad[:3].any()
    assert states_MD.grad[3:].abs().sum(-1).min() > 0


def test_without_noise_the_mean_is_compared(make_method: Callable[..., Method]) -> None:
    """As in validation."""
    method = make_method()
    batch, term = collate(method, EXAMPLES)
    zeros = torch.zeros(len(term.next_S), 32)
    ours = method(batch, batch.totals)
    theirs = method(replace(batch, terms={"step": replace(term, noise_SD=zeros)}), batch.totals)
    assert ours["embedding_loss"] == theirs["embedding_loss"]


def test_the_parts_of_the_loss_add_up(make_method: Callable[..., Method]) -> None:
    """L = L_ans + w (tokens + v embeddings), where answer and tokens are one mean over all of both."""
    method = make_method(step_weight=3.0, embedding_weight=0.25)
    batch, _ = collate(method, EXAMPLES, Seeds(5, [21, 22, 23]))
    shares = {key: value.item() for key, value in method(batch, batch.totals).items()}
    step = shares["token_loss"] + 0.25 * shares["embedding_loss"]
    assert shares["step_loss"] == pytest.approx(step)
    assert shares["loss"] == pytest.approx(shares["answer_loss"] + 3 * step)
    assert "step_accuracy" not in shares


def test_thoughts_stand_for_the_steps_that_are_not_written(make_method: Callable[..., Method]) -> None:
    method = make_method((1,))
    for stage, counts in (
        (Stage(8, 1), (4, 2, 0)),
        (Stage(8, 1, overlap=True), (5, 2, 0)),
        (Stage(8, None), (5, 2, 0)),
    ):
        batch = method.collate(EXAMPLES, stage)
        assert isinstance(batch, ThoughtBatch)
        assert batch.counts == counts, stage
