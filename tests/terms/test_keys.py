"""distill=kv against its definition: one row at a time, one block and one head at a time, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simcot_latent.batches import ThoughtBatch
from simcot_latent.config import LatentConfig, MethodConfig, RunConfig
from simcot_latent.curricula.base import Stage
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.method import Method
from simcot_latent.model.gpt import GPT
from simcot_latent.model.packing import Packing
from simcot_latent.model.taps import Taps
from simcot_latent.terms.text import written_text

K, LAMBDA = 5, 0.3


@pytest.fixture
def method(make_model: Callable[..., GPT], make_run: Callable[..., RunConfig], tokenizer: Tokenizer) -> Method:
    """KaVa's second pull alone: two query heads share a key/value head."""
    model = make_model("llama", vocab_size=tokenizer.n_vocab, context_length=256)
    own = {"kv_lambda": LAMBDA, "iterations": 1}
    latent = LatentConfig(n_latents=K, warmup=0.0)
    config = MethodConfig.simcot(latent, curriculum="none", loop="jacobi", steps="none", distill=["kv"], own=own)
    return Method(model, tokenizer, make_run(rationale="equations"), config)


def test_the_pull_is_that_of_its_definition(method: Method, problems: list[Problem]) -> None:
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    ours = method(batch, batch.totals)
    loop, total, pairs = method.loop, torch.zeros(()), 0
    assert loop is not None
    for example in examples:
        alone = method.collate([example], method.last_stage)
        assert isinstance(alone, ThoughtBatch)
        questions_PD = method.model.embedding(alone.question_ids_P)
        thoughts = loop.think(method.model, questions_PD, alone.questions, alone.counts, 8, keys=True)
        solution = written_text(example, Stage(), method.newline)
        ids, first = [*example.question[:-1], *solution.ids[:-1]], len(example.question) - 1
        taps = Taps(hidden=False, queries=True, keys=True, values=True, detach=True)
        method.model(torch.tensor(ids), Packing.of([len(ids)]), taps=taps)
        n_steps = len(solution) - len(example.answer)
        steps, answer = range(first, first + n_steps), range(first + n_steps, len(ids))
        assert thoughts.keys_LBKGE is not None
        assert thoughts.values_LBKGE is not None
        pairs += min(K, n_steps)
        if n_steps == 0:
            continue
        for layer in range(len(taps.keys_LNGE)):
            for head in range(taps.keys_LNGE.shape[2]):
                keys_NE, values_NE = (x[layer, list(steps), head] for x in (taps.keys_LNGE, taps.values_LNGE))
                shared = taps.queries_LNHE.shape[2] // taps.keys_LNGE.shape[2]
                asking = taps.queries_LNHE[layer][list(answer), head * shared : (head + 1) * shared].flatten(0, 1)
                chosen = best(asking, keys_NE, min(K, n_steps))
                for student_LBKGE, teacher_NE in ((thoughts.keys_LBKGE, keys_NE), (thoughts.values_LBKGE, values_NE)):
                    for slot, token in enumerate(chosen):
                        mine = student_LBKGE[layer, 0, slot, head]
                        total = total + 0.5 * F.smooth_l1_loss(mine, teacher_NE[token], reduction="sum")
    shape = method.model.config
    expected = total / (shape.n_layer * shape.n_embd // shape.n_head * shape.kv_heads * pairs)
    torch.testing.assert_close(ours["kv_loss"], expected.detach(), atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(expected, loop.get_parameter("start_D"))
    without = method(batch, batch.totals)
    (whole,) = torch.autograd.grad(without["loss"], loop.get_parameter("start_D"), retain_graph=True)
    method.terms.clear()
    answers = method(batch, batch.totals)["loss"]
    (of_answers,) = torch.autograd.grad(answers, loop.get_parameter("start_D"))
    torch.testing.assert_close(whole - of_answers, gradient, atol=1e-5, rtol=1e-3)


def best(asking_AE: Tensor, keys_NE: Tensor, most: int) -> list[int]:
    """R-KV: the tokens of the highest scores, in the order of the text."""
    N, E = keys_NE.shape
    attention_AN = (asking_AE @ keys_NE.T / math.sqrt(E)).softmax(-1)
    unit_NE = keys_NE / keys_NE.norm(dim=-1, keepdim=True)
    likeness = torch.stack([sum_of(unit_NE[i] @ unit_NE[j] for j in range(N) if j != i) / N for i in range(N)])
    scores = LAMBDA * attention_AN.mean(0) + (1 - LAMBDA) * (-likeness).softmax(0)
    return sorted(scores.argsort(descending=True, stable=True)[:most].tolist())


def sum_of(values: object) -> Tensor:
    return sum(values, start=torch.zeros(()))  # type: ignore[call-overload]


def test_the_written_pass_gets_no_gradient_of_the_pull(method: Method, problems: list[Problem]) -> None:
    """Of a token that stands in no question, only in steps, nothing is left for the table to learn."""
    examples = [method.encode(problem) for problem in problems]
    batch = method.collate(examples, method.last_stage)
    assert isinstance(batch, ThoughtBatch)
    assert batch.written is not None
    read = {*batch.question_ids_P.tolist(), *batch.text_ids_A.tolist()}
    only_written = sorted({*batch.written.ids_P.tolist()} - read)
    assert only_written
    method.model.embedding.weight.grad = None
    shares = method(batch, batch.totals)
    shares["loss"].backward()
    grad_VD = method.model.embedding.weight.grad
    method.terms.clear()
    method.model.embedding.weight.grad = None
    method(batch, batch.totals)["loss"].backward()
    assert grad_VD is not None
    without_VD = method.model.embedding.weight.grad
    assert without_VD is not None
    torch.testing.assert_close(grad_VD[only_written], without_VD[only_written], atol=1e-9, rtol=0)
