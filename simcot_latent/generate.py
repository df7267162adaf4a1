"""Batched generation: a question in, thoughts or written steps, an answer out.

Rows of a batch never see each other, and stop one by one: the answer to a question is the same alone
and in a batch.

Shapes: B rows, N rows still writing, P prompt tokens of all rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.checkpoint_config import setting
from simcot_latent.data.batch import by_length, to_device
from simcot_latent.data.format import encode_question
from simcot_latent.data.problem import ANSWER_MARK, strict_answer
from simcot_latent.errors import UserError
from simcot_latent.loops.base import Thoughts, go_on
from simcot_latent.loops.given import Ending, GivenLoop
from simcot_latent.model.cache import StaticCache, StaticCaches, make_cache
from simcot_latent.model.packing import Packing

# Rows that have stopped are read no further. They are taken out of the cache once this share or less is still writing:
# taking them out copies it, keeping them lets attention look at them in vain.
COMPACT_BELOW = 0.7


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one (temperature 0), or drawn.

    Attributes:
        temperature: what logits are divided by before the draw.
        top_k: draw among the k most likely tokens only; None: among all.
        generator: source of randomness; None: torch's global one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k}: must be at least 1, or null")

    def pick(self, logits_NV: Tensor) -> Tensor:
        """The next token of each row, (N,)."""
        if self.temperature == 0:
            return logits_NV.argmax(-1)
        logits_NV = logits_NV / self.temperature
        if self.top_k is not None:
            kth_N1 = logits_NV.topk(min(self.top_k, logits_NV.shape[-1]), dim=-1).values[:, -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < kth_N1, float("-inf"))
        return torch.multinomial(logits_NV.softmax(-1), 1, generator=self.generator).squeeze(1)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a question.

    Attributes:
        text: without special tokens.
        n_tokens: what it took: thoughts, and tokens written, end token included.
        finished: whether it came to its end token (else it ran into a limit).
        answer_mark: see `AnswerFormat`.
        n_passes: the passes over the model that were taken one after the other, that over the question among them.
        n_thoughts: its thoughts; of a loop that stops by itself, this question's own number.
        latents_KD: its thoughts; None for a model that writes its steps.
        before_KD: the hidden states before each thought, see `Thoughts`.
    """

    text: str
    n_tokens: int
    finished: bool
    answer_mark: str = ANSWER_MARK
    n_passes: int = 0
    n_thoughts: int = 0
    latents_KD: Tensor | None = field(default=None, compare=False, repr=False)
    before_KD: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def answer(self) -> str:
        """The number after the answer mark, `####`; empty where there is none."""
        return strict_answer(self.text, self.answer_mark) or ""


def encode_prompts(checkpoint: Checkpoint, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of questions, up to where thinking or writing starts.

    Raises:
        UserError: a question is empty, or leaves no room in the context for thoughts and an answer.
    """
    if isinstance(questions, str):
        raise UserError("questions: must be a list of texts, not one text")
    context = checkpoint.model.config.context_length
    limit = context - reads_between(checkpoint) - 1
    prompts: list[list[int]] = []
    for i, question in enumerate(questions):
        if not question.strip():
            raise UserError(f"question {i} is empty")
        ids = encode_question(checkpoint.tokenizer, question, checkpoint.answers)
        if len(ids) > limit:
            raise UserError(
                f"question {i} ({question[:40]!r}...) has {len(ids)} tokens: at most {limit} fit this model "
                f"(context {context}, less its thoughts and an answer)"
            )
        prompts.append(ids)
    return prompts


def reads_between(checkpoint: Checkpoint) -> int:
    """Positions that a model reads, at most, beside a prompt and before it writes: thoughts, and `<|eot|>`."""
    loop, thoughts = checkpoint.loop, checkpoint.stage.thoughts
    return (0 if loop is None else loop.positions(thoughts)) + len(checkpoint.answers.opening(checkpoint.tokenizer))


def think_about(
    checkpoint: Checkpoint,
    prompts: Sequence[list[int]],
    room: int = 0,
    caches: StaticCaches | None = None,
    sampling: Sampling | None = None,
) -> Thoughts:
    """Thoughts about encoded prompts, one batch.

    Args:
        room, caches: see `ThoughtLoop.think`.
        sampling: of a loop that draws its thoughts; None: it draws nothing.
    """
    model, loop = checkpoint.model, checkpoint.loop
    assert loop is not None
    counts, lengths = [checkpoint.n_states] * len(prompts), [len(prompt) - 1 for prompt in prompts]
    questions_PD = model.embedding(last_behind(prompts, checkpoint.device))
    packing = to_device(loop.pack_questions(lengths, counts), checkpoint.device)
    if not isinstance(loop, GivenLoop):
        return loop.think(model, questions_PD, packing, counts, room, caches)
    sampling = sampling or Sampling()
    ending = Ending(checkpoint.tokenizer.eot_id, sampling.temperature, sampling.generator)
    return loop.think(model, questions_PD, packing, counts, room, caches, ending=ending)


def last_behind(prompts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Token ids (P,) of prompts, the last of every row at the end."""
    return torch.tensor([i for ids in prompts for i in ids[:-1]] + [ids[-1] for ids in prompts], device=device)


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    questions: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    caches: StaticCaches | None = None,
) -> list[Generation]:
    """Answers questions as one batch.

    Args:
        max_new_tokens: what a row may write, end token included, thoughts not counted; less where the context ends.
        caches: to read and write in static shapes, on a GPU as CUDA graphs; see `StaticCache`. None: in those needed.

    Raises:
        UserError: see `encode_prompts`.
    """
    if not questions:
        return []
    sampling = sampling or Sampling()
    model, tokenizer, device = checkpoint.model, checkpoint.tokenizer, checkpoint.device
    prompts = encode_prompts(checkpoint, questions)
    # Each row's own limit: what fits must not depend on the company it is in.
    spent, opening = reads_between(checkpoint), checkpoint.answers.opening(tokenizer)
    limits = [min(max_new_tokens, model.config.context_length - len(ids) - spent) for ids in prompts]
    B, room = len(prompts), len(opening) + max(limits)
    n_thoughts = [checkpoint.stage.thoughts] * B
    latents: Sequence[Tensor | None] = [None] * B
    before: Sequence[Tensor | None] = [None] * B
    if checkpoint.stage.thoughts and checkpoint.loop is not None:
        thoughts = think_about(checkpoint, prompts, room, caches, sampling)
        latents = thoughts.latents_BKD.unbind()
        if thoughts.counts is not None:
            n_thoughts = list(thoughts.counts)
            latents = [latents_KD[:n] for latents_KD, n in zip(latents, n_thoughts, strict=True)]
        before = before if thoughts.before_BKD is None else thoughts.before_BKD.unbind()
        opening_PD = model.embedding(torch.tensor(opening * B, device=device))
        packing = checkpoint.loop.pack_texts([len(opening)] * B, [checkpoint.n_states] * B)
        hidden_ND = go_on(model, thoughts, opening_PD, to_device(packing, device))
        cache = thoughts.cache
    else:
        opened = [ids + opening for ids in prompts]
        packing = to_device(Packing.of([len(ids) - 1 for ids in opened], [1] * B), device)
        cache = make_cache(B, packing.longest + room, caches)
        hidden_ND = model(last_behind(opened, device), packing, cache, read_out=B)

    written: list[list[int]] = [[] for _ in prompts]
    finished = [False] * B
    rows = list(range(B))  # which question each row of the batch answers
    going = list(range(B))  # the rows that still write; `hidden_ND` holds theirs alone
    while True:
        ids_N = sampling.pick(model.logits(hidden_ND))
        kept: list[int] = []
        for place, (row, token) in enumerate(zip(going, ids_N.tolist(), strict=True)):
            i = rows[row]
            written[i].append(token)
            finished[i] = token == tokenizer.end_id
            if not finished[i] and len(written[i]) < limits[i]:
                kept.append(place)
        if not kept:
            break
        if len(kept) < len(going):
            ids_N = ids_N[torch.tensor(kept, device=device)]
            going = [going[place] for place in kept]
        if isinstance(cache, StaticCache):  # the others are read on in vain
            ids_B = torch.zeros(B, dtype=torch.long, device=device)
            ids_B[going] = ids_N
            hidden_ND = model(ids_B, Packing.grid(B, 1, device), cache)[going]
            continue
        if len(going) <= COMPACT_BELOW * len(rows):
            cache.keep(torch.tensor(going, device=device))
            rows, going = [rows[row] for row in going], list(range(len(going)))
        if len(going) == len(rows):
            packing = Packing.grid(len(rows), 1, device)
        else:
            writes = set(going)
            packing = to_device(Packing.of([row in writes for row in range(len(rows))]), device)
        hidden_ND = model(ids_N, packing, cache)
    mark, loop = checkpoint.answers.answer_mark, checkpoint.loop
    n_passes = [loop.n_passes(n) if loop is not None and checkpoint.stage.thoughts else 0 for n in n_thoughts]
    return [
        Generation(tokenizer.decode(ids), n + len(ids), done, mark, passes + len(ids), n, *states)
        for ids, done, n, passes, *states in zip(written, finished, n_thoughts, n_passes, latents, before, strict=True)
    ]


def answer(
    checkpoint: Checkpoint, questions: Sequence[str], *, batch_size: int = 64, max_new_tokens: int | None = None
) -> list[str]:
    """The model's final answers, greedy, in the order of the questions: the number after `####`, or an empty string.

    Raises:
        UserError: a question is empty or does not fit the context.
    """
    return [g.answer for g in generate_all(checkpoint, questions, batch_size, max_new_tokens)]


def generate_all(
    checkpoint: Checkpoint,
    questions: Sequence[str],
    batch_size: int,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    caches: StaticCaches | None = None,
) -> list[Generation]:
    """`generate` in batches of similar length; results in the order of the questions."""
    limit = setting(checkpoint, "max_new_tokens") if max_new_tokens is None else max_new_tokens
    lengths = [len(ids) for ids in encode_prompts(checkpoint, questions)]
    results: dict[int, Generation] = {}
    for batch in by_length(lengths, batch_size):
        generations = generate(checkpoint, [questions[i] for i in batch], limit, sampling, caches)
        results.update(zip(batch, generations, strict=True))
    return [results[i] for i in range(len(questions))]
