"""Generation: the same answer alone and in any company, and the same as a naive loop without cache or batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from simcot_latent import generate as generate_module
from simcot_latent.checkpoint import Checkpoint
from simcot_latent.curricula.base import Stage
from simcot_latent.data.format import AnswerFormat
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.generate import Generation, Sampling, answer, encode_prompts, generate, generate_all, last_behind
from simcot_latent.loops.base import NoSettings, ThoughtLoop
from simcot_latent.loops.pause import Pause
from simcot_latent.loops.sequential import Sequential, SequentialConfig
from simcot_latent.model.cache import KVCache
from simcot_latent.model.gpt import GPT, Transformer
from simcot_latent.model.packing import Packing
from simcot_latent.parts import find
from simcot_latent.terms.steps import StepGroups

WIDTH = 32


@dataclass(frozen=True)
class Way:
    """A way to answer: how a model thinks, how many thoughts, and how many of them are a step group."""

    loop: ThoughtLoop | None = None
    thoughts: int = 0
    per_step: int = 1
    answer_mark: str = "####"

    @property
    def thinks(self) -> bool:
        return self.loop is not None

    def of(self, model: GPT, tokenizer: Tokenizer, max_new_tokens: int = 24) -> Checkpoint:
        """A checkpoint whose model answers so."""
        return Checkpoint(
            model,
            None,
            tokenizer,
            {"max_new_tokens": max_new_tokens},
            answers=AnswerFormat(thinks=self.thinks, answer_mark=self.answer_mark),
            loop=self.loop,
            stage=Stage(self.thoughts, first_written=None if self.thoughts else 0),
            groups=StepGroups(self.per_step),
        )


def sequential(feeds_last: bool = True) -> Sequential:
    return Sequential(WIDTH, SequentialConfig(feeds_last))


def pause() -> Pause:
    loop = Pause(WIDTH, NoSettings())
    loop.pause_D.data = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    return loop.requires_grad_(False)


WRITTEN = Way()
WAYS = {
    "written": WRITTEN,
    "written after bot and eot": Way(sequential()),  # what the warm-up of mode=latent trains
    "one thought": Way(sequential(), 1),
    "four thoughts": Way(sequential(), 4, per_step=2),
    "three thoughts and a state that is only decoded": Way(sequential(feeds_last=False), 3, per_step=2),
    "three pauses": Way(pause(), 3),
}

QUESTIONS = [
    "How many?",
    "Ann has 3 pears and eats 2 of them. How many are left?",
    "2+2?",
    "Joe saves $5 a day for a week, then buys a book for $12 and doubles what is left. How much has he got now?",
    "A dog and a cat: how many legs?",
    "If x is 7, what is 3 times x, less 1?",
    "Bo?",
    "There are 12 eggs in a box and 4 boxes on a shelf. Two shelves hold how many eggs?",
    "Half of 30?",
    "Kim reads 5 pages a day. How many in 6 days?",
    "A week has 7 days; how many have 3 weeks and 2 days?",
    "10 - 4 + 1 = ?",
    "Tom is 3 times as old as Sue, who is 4. How old will Tom be in 2 years, when Sue is 6?",
    "What is left of $20 after 4 pens at $3?",
    "Why?",
    "A train goes 60 miles an hour for 3 hours, rests, and goes on for 30 miles. How far has it gone in all?",
]

MAX_NEW_TOKENS = 24


# Seed of the random weights, and how much larger the end token's row of the output table is, for each model to end now
# sooner, now later, and never to find two tokens likely to within rounding (`test_equals_a_naive_loop` looks).
ENDING = {"gpt2": (61, 10.0), "llama": (144, 5.0), "nanochat": (110, 14.0)}


@pytest.fixture(params=ENDING)
def ending_model(request: pytest.FixtureRequest, make_model: Callable[..., GPT], tokenizer: Tokenizer) -> GPT:
    """A random model of each family that comes to its end token, now sooner, now later, now not at all."""
    seed, end_factor = ENDING[request.param]
    return build_ending_model(make_model, tokenizer, request.param, end_factor, seed=seed)


def build_ending_model(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, family: str, end_factor: float, **changes: Any
) -> GPT:
    """`end_factor` scales the end token's row of the output table: with 0 the model never ends."""
    model = make_model(family, vocab_size=tokenizer.n_vocab, **({"context_length": 160} | changes))
    table = model.embedding if model.head is None else model.head
    with torch.no_grad():
        table.weight[tokenizer.end_id] *= end_factor
    return model


@torch.no_grad()
def naive_generation(
    model: GPT, tokenizer: Tokenizer, way: Way, question: str, max_new_tokens: int
) -> tuple[Generation, float]:
    """One question, greedy: a list of input vectors, and a whole new pass for every thought and every token.

    Returns:
        What is written, and by how much the likeliest token led the next likely one where the race was closest.
    """

    def last_state() -> Tensor:
        return model.transformer(torch.stack(vectors).unsqueeze(0))[0, -1]

    prompt = tokenizer.encode(question) + ([tokenizer.bot_id] if way.thinks else tokenizer.encode("\n"))
    vectors = [model.embedding.weight[i] for i in prompt]
    latents: list[Tensor] = []
    for _ in range(way.thoughts):
        if isinstance(way.loop, Pause):
            vectors.append(way.loop.pause_D)
            latents.append(last_state())
        else:
            latents.append(last_state())
            vectors.append(latents[-1])
    if latents and isinstance(way.loop, Sequential) and not way.loop.config.feeds_last:
        latents.append(last_state())
    latents_KD = torch.stack(latents) if latents else None
    if way.thinks:
        vectors.append(model.embedding.weight[tokenizer.eot_id])
    written: list[int] = []
    lead = float("inf")
    while tokenizer.end_id not in written and len(written) < max_new_tokens:
        best, ids = model.logits(last_state()).topk(2)
        lead = min(lead, (best[0] - best[1]).item())
        written.append(int(ids[0]))
        vectors.append(model.embedding.weight[written[-1]])
    text, finished = tokenizer.decode(written), tokenizer.end_id in written
    n_passes = len(written)  # each token is read in the pass after it, but the last; the first one follows the text
    if way.thoughts:
        n_passes += 1 if isinstance(way.loop, Pause) else len(latents)
    n_tokens, n = way.thoughts + len(written), way.thoughts
    return Generation(text, n_tokens, finished, n_passes=n_passes, n_thoughts=n, latents_KD=latents_KD), lead


# The same alone and in company


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_equals_a_naive_loop(ending_model: GPT, tokenizer: Tokenizer, way: Way) -> None:
    """All questions in one packed batch, each against its own loop; they end at different times, some not at all."""
    generations = generate(way.of(ending_model, tokenizer), QUESTIONS, MAX_NEW_TOKENS)
    expected = [naive_generation(ending_model, tokenizer, way, q, MAX_NEW_TOKENS) for q in QUESTIONS]
    assert min(lead for _, lead in expected) > 1e-3, "so near a tie that rounding decides: take another seed"
    assert generations == [generation for generation, _ in expected]
    for found, (wanted, _) in zip(generations, expected, strict=True):
        torch.testing.assert_close(found.latents_KD, wanted.latents_KD, atol=1e-4, rtol=1e-4)
    lengths = {generation.n_tokens for generation in generations}
    assert len(lengths) >= 4, f"too much alike to prove anything: {lengths}"
    assert len({generation.text for generation in generations}) >= 4


LOOPS: dict[str, tuple[dict[str, Any], int]] = {
    "sequential": ({}, 4),
    "sequential, last is only decoded": ({"feeds_last": False}, 5),
    "soft": ({}, 4),
    "pause": ({}, 1),
    "pause_multipass": ({}, 5),
    "jacobi": ({"iterations": 2}, 3),
    "looped": ({"loops": 3}, 4),
}
"""Settings of a loop, and the passes that it takes to four thoughts, that over the question among them."""


@pytest.mark.parametrize("loop", LOOPS)
def test_passes_are_those_that_were_taken(
    loop: str, make_model: Callable[..., GPT], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the model: up to the last thought, then one over `<|eot|>`, and one for each token but the last."""
    model = build_ending_model(make_model, tokenizer, "llama", 5.0)
    cls, (settings, passes) = find("loop", loop.split(",")[0]), LOOPS[loop]
    checkpoint = Way(cls(WIDTH, cls.Config(**settings)), 4).of(model, tokenizer)
    taken: list[int] = []
    monkeypatch.setattr(model.transformer, "forward", counted(model.transformer.forward, taken))
    for question in QUESTIONS[:4]:
        taken.clear()
        (found,) = generate(checkpoint, [question], 6)
        written = found.n_tokens - 4
        assert found.n_passes == len(taken) == passes + written, loop


def counted(forward: Callable[..., Tensor], taken: list[int]) -> Callable[..., Tensor]:
    """A function that adds to a list when it is called."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        taken.append(1)
        return forward(*arguments, **options)

    return call


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_same_at_any_batch_size(ending_model: GPT, tokenizer: Tokenizer, way: Way, batch_size: int) -> None:
    """`generate_all` sorts by length and cuts into batches; results come in the order of the questions."""
    checkpoint = way.of(ending_model, tokenizer, MAX_NEW_TOKENS)
    at_once = generate(checkpoint, QUESTIONS, MAX_NEW_TOKENS)
    assert generate_all(checkpoint, QUESTIONS, batch_size) == at_once


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_lengths_make_no_difference(ending_model: GPT, tokenizer: Tokenizer, way: Way) -> None:
    """A question alone, beside another of its own length, and beside longer ones, wherever it stands."""
    short, same_length, long = "How many?", "How much?", QUESTIONS[3]
    assert len({len(tokenizer.encode(q)) for q in (short, same_length)}) == 1

    def answers_to(*questions: str) -> dict[str, Generation]:
        generations = generate(way.of(ending_model, tokenizer), questions, MAX_NEW_TOKENS)
        return dict(zip(questions, generations, strict=True))

    alone = {question: answers_to(question)[question] for question in (short, same_length, long)}
    for company in permutations(alone):
        assert answers_to(*company) == alone
    assert answers_to(short, same_length) == {question: alone[question] for question in (short, same_length)}


@pytest.mark.parametrize("share", [0.0, generate_module.COMPACT_BELOW, 1.0])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_is_read_in_vain(
    ending_model: GPT, tokenizer: Tokenizer, way: Way, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever rows are taken out: a batch reads as many tokens as its questions alone would, no padding and nothing
    after a row has stopped. That is the prompt, the thoughts, `<|eot|>` and all that it writes but the last token."""
    monkeypatch.setattr(generate_module, "COMPACT_BELOW", share)
    read: list[int] = []
    forward = Transformer.forward

    def spy(transformer: Transformer, x: Tensor, packing: Packing, *args: Any, **kwargs: Any) -> Tensor:
        read.append(len(x))
        return forward(transformer, x, packing, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", spy)
    generations = generate(way.of(ending_model, tokenizer), QUESTIONS, MAX_NEW_TOKENS)
    assert len({generation.n_tokens for generation in generations}) >= 4, "they must stop at different times"
    prompts = encode_prompts(way.of(ending_model, tokenizer), QUESTIONS)
    after = sum(way.thinks + generation.n_tokens - 1 for generation in generations)
    assert sum(read) == sum(map(len, prompts)) + after


@pytest.mark.parametrize("loop", [None, sequential(), pause()], ids=["written", "sequential", "pause"])
def test_the_last_tokens_of_packed_prompts_are_theirs(loop: ThoughtLoop | None) -> None:
    """Where thinking or writing starts, in the order of the rows."""
    prompts = [[5, 6, 7], [8], [9, 10]]
    before = [len(prompt) - 1 for prompt in prompts]
    packing = Packing.of(before, [1] * 3) if loop is None else loop.pack_questions(before, [0] * 3)
    ids_P = last_behind(prompts, torch.device("cpu"))
    assert ids_P.tolist() == [5, 6, 9, 7, 8, 10]
    places = zip(packing.row_P.tolist(), packing.offset_P.tolist(), strict=True)
    assert [prompts[row][offset] for row, offset in places] == ids_P.tolist()
    assert packing.row_P[-3:].tolist() == [0, 1, 2]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_taking_rows_out_makes_no_difference(
    ending_model: GPT, tokenizer: Tokenizer, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that have stopped stay in the cache, leave when enough have stopped, or leave at once: all the same."""
    kept: list[int] = []
    keep = KVCache.keep

    def spy(cache: KVCache, rows_N: Tensor) -> None:
        kept.append(len(rows_N))
        keep(cache, rows_N)

    monkeypatch.setattr(KVCache, "keep", spy)
    usual = generate(way.of(ending_model, tokenizer), QUESTIONS, MAX_NEW_TOKENS)
    assert len(kept) >= 2, "the default must have taken rows out, more than once, for this to prove it"
    assert all(a > b for a, b in pairwise([len(QUESTIONS), *kept]))
    for share, expects_calls in ((0.0, False), (1.0, True)):
        kept.clear()
        monkeypatch.setattr(generate_module, "COMPACT_BELOW", share)
        assert generate(way.of(ending_model, tokenizer), QUESTIONS, MAX_NEW_TOKENS) == usual
        assert bool(kept) == expects_calls


def test_no_questions(ending_model: GPT, tokenizer: Tokenizer) -> None:
    checkpoint = WRITTEN.of(ending_model, tokenizer)
    assert generate(checkpoint, [], MAX_NEW_TOKENS) == []
    assert generate_all(checkpoint, [], batch_size=4) == []


# Limits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_each_row_stops_where_its_own_context_ends(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, way: Way, family: str
) -> None:
    """A model that never ends: prompt, thoughts, `<|eot|>` and what is written fill the context and go no further,
    for every row, whatever company it is in; a row that has stopped waits for the others without going on. Learned
    positions would fail loudly."""
    context = 40
    model = build_ending_model(make_model, tokenizer, family, end_factor=0.0, context_length=context)
    questions = ["How many?", "12+12-3?", "Ann has 3 pears and eats 2. How many are left?", "If x is 7, what is x+1?"]
    checkpoint = way.of(model, tokenizer)
    prompts = encode_prompts(checkpoint, questions)
    assert len(set(map(len, prompts))) == len(prompts)
    assert 1 - 1 / len(prompts) > generate_module.COMPACT_BELOW, "the longest must stay in the batch for a while"
    together = generate(checkpoint, questions, max_new_tokens=1000)
    for question, prompt, generation in zip(questions, prompts, together, strict=True):
        assert not generation.finished
        assert len(prompt) + way.thinks + generation.n_tokens == context
        assert generate(checkpoint, [question], max_new_tokens=1000) == [generation]


def test_max_new_tokens_does_not_count_thoughts(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    model = build_ending_model(make_model, tokenizer, "llama", end_factor=0.0)
    for generation in generate(WAYS["four thoughts"].of(model, tokenizer), QUESTIONS, max_new_tokens=5):
        assert (generation.n_tokens, generation.finished) == (4 + 5, False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_longest_question_that_fits_and_one_more(
    make_model: Callable[..., GPT], tokenizer: Tokenizer, way: Way
) -> None:
    """A question that leaves room for a single token is answered with one; the next is refused, by its number."""
    model = build_ending_model(make_model, tokenizer, "gpt2", end_factor=0.0, context_length=40)
    checkpoint = way.of(model, tokenizer)
    room = 40 - 1 - way.thinks - way.thoughts - 1  # less the answer's token, <eot>, thoughts, <bot> or newline
    question = "7" * room
    assert len(tokenizer.encode(question)) == room
    (generation,) = generate(checkpoint, [question], max_new_tokens=10)
    assert generation.n_tokens == way.thoughts + 1
    with pytest.raises(UserError, match=rf"question 1 \('777.*has {room + 2} tokens: at most {room + 1} fit"):
        generate(checkpoint, ["Short?", question + "7"], max_new_tokens=10)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question(ending_model: GPT, tokenizer: Tokenizer, question: str) -> None:
    with pytest.raises(UserError, match="question 1 is empty"):
        generate(WRITTEN.of(ending_model, tokenizer), ["How many?", question], MAX_NEW_TOKENS)


def test_all_questions_are_checked_before_any_is_answered(ending_model: GPT, tokenizer: Tokenizer) -> None:
    """And numbered over all of them, not within a batch."""
    checkpoint = WRITTEN.of(ending_model, tokenizer)
    with pytest.raises(UserError, match="question 5 is empty"):
        generate_all(checkpoint, [*QUESTIONS[:5], " "], batch_size=2)


# Answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [("#### 12", "12"), ("<<3*4=12>>\n#### 1,200", "1200"), ("it is 12", ""), ("", ""), ("#### 5\n#### 6", "5")],
)
def test_the_answer_of_a_generation(text: str, expected: str) -> None:
    assert Generation(text, 1, True).answer == expected


def test_the_answer_stands_behind_the_models_own_mark(ending_model: GPT, tokenizer: Tokenizer) -> None:
    """As a published checkpoint writes it; the mark comes with the way the model answers."""
    text = "#### 5 pens, so The answer is: 1,200"
    assert Generation(text, 1, True, "The answer is:").answer == "1200"
    assert Generation(text, 1, True).answer == "5"
    checkpoint = Way(answer_mark="The answer is:").of(ending_model, tokenizer)
    assert {g.answer_mark for g in generate(checkpoint, QUESTIONS[:2], 2)} == {"The answer is:"}


def test_answer_reads_generations(ending_model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the questions, at any batch size, and with the run's max_new_tokens unless told otherwise."""
    asked: list[int] = []

    def echo(checkpoint: Checkpoint, questions: Sequence[str], limit: int, *_: None) -> list[Generation]:
        asked.append(limit)
        return [Generation(f"#### {len(question)}", 1, True) for question in questions]

    monkeypatch.setattr(generate_module, "generate", echo)
    checkpoint = WRITTEN.of(ending_model, tokenizer, max_new_tokens=77)
    assert answer(checkpoint, QUESTIONS, batch_size=3) == [str(len(question)) for question in QUESTIONS]
    assert asked == [77] * 6
    answer(checkpoint, QUESTIONS, max_new_tokens=9)
    assert asked[6:] == [9]


# Sampling


def test_top_1_is_greedy(ending_model: GPT, tokenizer: Tokenizer) -> None:
    checkpoint = WRITTEN.of(ending_model, tokenizer)
    greedy = generate(checkpoint, QUESTIONS, MAX_NEW_TOKENS)
    sampled = generate(checkpoint, QUESTIONS, MAX_NEW_TOKENS, Sampling(1.0, top_k=1))
    assert sampled == greedy


def test_seeds_reproduce(ending_model: GPT, tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> list[Generation]:
        sampling = Sampling(1.0, top_k=20, generator=torch.Generator().manual_seed(seed))
        return generate(WAYS["one thought"].of(ending_model, tokenizer), QUESTIONS, MAX_NEW_TOKENS, sampling)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 100)])
def test_draws_follow_the_distribution(temperature: float, top_k: int | None) -> None:
    """Frequencies of 20,000 draws against softmax(logits / temperature) over the k largest, to five standard errors."""
    logits_V = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5])
    n = 20_000
    sampling = Sampling(temperature, top_k, torch.Generator().manual_seed(0))
    counts_V = torch.bincount(sampling.pick(logits_V.expand(n, -1)), minlength=5)
    allowed = sorted(range(5), key=lambda i: -logits_V[i].item())[: top_k or 5]
    weights = [(logits_V[i].item() / temperature) if i in allowed else float("-inf") for i in range(5)]
    expected_V = torch.tensor(weights).softmax(0)
    error_V = (counts_V / n - expected_V).abs()
    assert (error_V <= 5 * (expected_V * (1 - expected_V) / n).sqrt()).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1, or null"),
    ],
)
def test_impossible_sampling(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        Sampling(**arguments)
    assert str(error.value) == says


def test_one_text_is_no_list_of_questions(make_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    checkpoint = Way().of(make_model("llama", vocab_size=tokenizer.n_vocab), tokenizer)
    with pytest.raises(UserError, match=r"^questions: must be a list of texts, not one text$"):
        answer(checkpoint, "Half of 9?")
