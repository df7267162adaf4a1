"""Batched generation: a question in, thoughts or written steps, an answer out.

Rows of a batch never see each other or their padding, and stop one by one: the answer to a question is the same alone
and in a batch.

Shapes: B rows still writing, T prompt tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simcot_latent.checkpoint import Checkpoint
from simcot_latent.data.batch import by_length, pad_right
from simcot_latent.data.format import encode_question
from simcot_latent.data.problem import strict_answer
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT
from simcot_latent.model.thoughts import ThoughtFormat, Thoughts, go_on, last_real, think

# Rows that have stopped are taken out of the batch once this share or less is still writing: taking them out copies
# the cache, keeping them computes in vain.
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

    def pick(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row, (B,)."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None:
            kth_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=self.generator).squeeze(1)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a question.

    Attributes:
        text: without special tokens.
        n_tokens: what it took: thoughts, and tokens written, end token included.
        finished: whether it came to its end token (else it ran into a limit).
    """

    text: str
    n_tokens: int
    finished: bool

    @property
    def answer(self) -> str:
        """The number after `####`; empty where there is none."""
        return strict_answer(self.text) or ""


def encode_prompts(
    model: GPT, tokenizer: Tokenizer, thoughts: ThoughtFormat, questions: Sequence[str]
) -> list[list[int]]:
    """Token ids of questions, up to where thinking or writing starts.

    Raises:
        UserError: a question is empty, or leaves no room in the context for thoughts and an answer.
    """
    limit = model.config.context_length - thoughts.n_latents - 1 - thoughts.thinks
    prompts: list[list[int]] = []
    for i, question in enumerate(questions):
        if not question.strip():
            raise UserError(f"question {i} is empty")
        ids = encode_question(tokenizer, question, thinks=thoughts.thinks)
        if len(ids) > limit:
            raise UserError(
                f"question {i} ({question[:40]!r}...) has {len(ids)} tokens: at most {limit} fit this model "
                f"(context {model.config.context_length}, less its thoughts and an answer)"
            )
        prompts.append(ids)
    return prompts


def think_about(
    model: GPT,
    tokenizer: Tokenizer,
    thoughts: ThoughtFormat,
    prompts: Sequence[list[int]],
    cache: KVCache | None = None,
) -> Thoughts:
    """Thoughts about encoded prompts, one batch; as `think`, from lists of ids."""
    ids_BT, mask_BT = pad_right(prompts, tokenizer.pad_id)
    device = model.embedding.weight.device
    return think(model, ids_BT.to(device), mask_BT.to(device), thoughts.n_latents, cache)


@torch.no_grad()
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    thoughts: ThoughtFormat,
    questions: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> list[Generation]:
    """Answers questions as one batch.

    Args:
        thoughts: how the model answers.
        max_new_tokens: what a row may write, end token included, thoughts not counted; less where the context ends.

    Raises:
        UserError: see `encode_prompts`.
    """
    if not questions:
        return []
    sampling = sampling or Sampling()
    prompts = encode_prompts(model, tokenizer, thoughts, questions)
    device = model.embedding.weight.device
    # Each row's own limit: what fits must not depend on the company it is in.
    spent = thoughts.n_latents + thoughts.thinks
    limits = [min(max_new_tokens, model.config.context_length - len(ids) - spent) for ids in prompts]
    cache = KVCache(capacity=max(map(len, prompts)) + spent + max(limits))
    if thoughts.n_latents:
        state = think_about(model, tokenizer, thoughts, prompts, cache)
        eot_B1 = torch.full((len(prompts), 1), tokenizer.eot_id, device=device)
        hidden_BD = go_on(model, state, eot_B1)[:, -1]
    else:
        opening = [tokenizer.eot_id] if thoughts.thinks else []
        ids_BT, mask_BT = (x.to(device) for x in pad_right([ids + opening for ids in prompts], tokenizer.pad_id))
        hidden_BD = last_real(model(ids_BT, mask_BT=mask_BT, cache=cache), mask_BT)

    written: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    rows = list(range(len(prompts)))  # which question each row of the batch answers
    going = list(range(len(prompts)))  # the rows that still write
    while True:
        ids_B = sampling.pick(model.logits(hidden_BD))
        tokens = ids_B.tolist()
        for i in going:
            written[rows[i]].append(tokens[i])
            finished[rows[i]] = tokens[i] == tokenizer.end_id
        going = [i for i in going if not finished[rows[i]] and len(written[rows[i]]) < limits[rows[i]]]
        if not going:
            break
        if len(going) <= COMPACT_BELOW * len(rows):
            keep_N = torch.tensor(going, device=device)
            cache.keep(keep_N)
            ids_B = ids_B[keep_N]
            rows, going = [rows[i] for i in going], list(range(len(going)))
        # A row that has stopped but is still in the batch reads padding, which takes no position of the context.
        writes_B1 = torch.zeros(len(rows), 1, dtype=torch.bool)
        writes_B1[going] = True
        hidden_BD = model(ids_B.unsqueeze(1), mask_BT=writes_B1.to(device), cache=cache)[:, -1]
    return [
        Generation(tokenizer.decode(ids), thoughts.n_latents + len(ids), done)
        for ids, done in zip(written, finished, strict=True)
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
) -> list[Generation]:
    """`generate` in batches of similar length; results in the order of the questions."""
    model, tokenizer, thoughts = checkpoint.model, checkpoint.tokenizer, checkpoint.thoughts
    limit = checkpoint.config["max_new_tokens"] if max_new_tokens is None else max_new_tokens
    lengths = [len(ids) for ids in encode_prompts(model, tokenizer, thoughts, questions)]
    results: dict[int, Generation] = {}
    for batch in by_length(lengths, batch_size):
        generations = generate(model, tokenizer, thoughts, [questions[i] for i in batch], limit, sampling)
        results.update(zip(batch, generations, strict=True))
    return [results[i] for i in range(len(questions))]
