"""Every choice of parts that the table allows is trained, and every other one is refused in one line.

What is refused stands below as rules, written without looking at the code: a choice that comes to be refused or
accepted by mistake is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, product
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from simcot_latent.config import MethodConfig, RunConfig, config_dir, parse
from simcot_latent.data.batch import Seeds
from simcot_latent.data.format import Example
from simcot_latent.data.problem import Problem
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.generate import generate
from simcot_latent.method import Method, ThoughtBatch
from simcot_latent.model.gpt import GPT, GPTConfig
from simcot_latent.model.losses import add_up
from simcot_latent.parts import NONE, PARTS
from simcot_latent.training.optimizer import make_optimizers, update
from simcot_latent.training.saving import as_checkpoint

SINGLE = ("curriculum", "loop", "steps", "written")
"""The groups of which a method has one part, or none."""

SETTINGS: dict[str, dict[str, Any]] = {
    # Two groups of two thoughts: the solution is written, then its first step is not, then none is.
    "loop": {"latent": {"n_latents": 4, "latents_per_step": 2, "warmup": 0.25, "stages": 0.25}},
    "soft": {"latent": {"top_k": 5}},
    "remove_tokens": {"latent": {"remove_all_at": 12}},
    "kv": {"loss": {"kv_norm": "std"}},  # of which there is none where a micro-batch has no step
}
"""Settings for any loop, and for parts that would do little of what they can as they are."""

PROGRESS = (0.0, 0.3, 1.0)
"""Shares of training at which optimizer steps are taken: in each of these stages, or tokens removed. The first is left
out where all is one stage, so that each choice takes two or three."""


@dataclass(frozen=True)
class Choice:
    """The parts of a method."""

    curriculum: str
    loop: str
    steps: str
    written: str
    distill: tuple[str, ...]

    @property
    def parts(self) -> dict[str, Any]:
        return {**{group: getattr(self, group) for group in SINGLE}, "distill": list(self.distill)}

    def __str__(self) -> str:
        return " ".join(f"{group}={'+'.join(v) if isinstance(v, list) else v}" for group, v in self.parts.items())


def choices() -> Iterator[Choice]:
    """All of them: a part of each group or none, of `distill` any number."""
    several = [these for n in range(len(PARTS["distill"]) + 1) for these in combinations(sorted(PARTS["distill"]), n)]
    groups = [sorted({*PARTS[group], NONE}) for group in SINGLE]
    for curriculum, loop, steps, written in product(*groups):
        yield from (Choice(curriculum, loop, steps, written, distill) for distill in several)


# What is refused

KNOWS_HIDDEN = {"jacobi", "looped", "pause", "pause_multipass"}
"""Loops after which the hidden state at every thought is known; `sequential` reads its last thought with the text."""

KNOWS_KEYS = {"jacobi", "looped", "pause"}
"""Loops in which one pass reads all thoughts last, so that their keys and values are at hand."""

RULES: dict[str, Callable[[Choice], list[str]]] = {
    "thoughts that replace steps need a loop": lambda c: (
        [f"curriculum={c.curriculum}", "loop=none"] if c.loop == NONE and c.curriculum in ("replace", "fixed_k") else []
    ),
    "who must say the steps reads them from thoughts": lambda c: (
        [f"steps={c.steps}", "loop=none"] if c.loop == NONE and c.steps != NONE else []
    ),
    "what is pulled is thought": lambda c: (
        [f"distill={c.distill[0]}", "loop=none"] if c.loop == NONE and c.distill else []
    ),
    "a written pass is beside one with thoughts": lambda c: (
        [f"written={c.written}", "loop=none"] if c.loop == NONE and c.written != NONE else []
    ),
    "iCoT thinks nothing": lambda c: (
        ["curriculum=remove_tokens", f"loop={c.loop}"] if c.curriculum == "remove_tokens" and c.loop != NONE else []
    ),
    "LOTUS's head reads the hidden states at thoughts": lambda c: (
        ["steps=own_head", f"loop={c.loop}"] if c.steps == "own_head" and c.loop not in KNOWS_HIDDEN else []
    ),
    "KaVa pulls the keys of thoughts": lambda c: (
        ["distill=kv", f"loop={c.loop}"] if "kv" in c.distill and c.loop not in KNOWS_KEYS else []
    ),
    "CoLaR's loop learns from its own term alone": lambda c: (
        ["loop=compressed", "steps=compressed"] if c.loop == "compressed" and c.steps != "compressed" else []
    ),
    "CoLaR's term trains what its own loop predicts": lambda c: (
        ["steps=compressed", f"loop={c.loop}"] if c.steps == "compressed" and c.loop != "compressed" else []
    ),
}
"""Each says what the line must name of a choice that it refuses; nothing: it does not refuse it."""


def refusals(choice: Choice) -> list[list[str]]:
    """What the line may name, by each rule that refuses a choice."""
    return [named for rule in RULES.values() if (named := rule(choice))]


CHOICES = list(choices())
BY_CURRICULUM_AND_LOOP = [
    pytest.param(list(group), id=f"{curriculum}-{loop}")
    for (curriculum, loop), group in groupby(CHOICES, lambda choice: (choice.curriculum, choice.loop))
]


# What is done with each

FILES: dict[tuple[str, str], Any] = {
    (group, key): OmegaConf.to_container(OmegaConf.load(config_dir() / group / f"{key}.yaml"))
    for group in (*SINGLE, "distill")
    for key in (*PARTS[group], NONE)
}


def composed(choice: Choice) -> DictConfig:
    """What a command line with these parts composes: what all methods share, and the yaml file of each part."""
    raw: dict[str, Any] = {"mode": "product", "model": {}, "data": {}, "tokenizer": {}, "rationale": "equations"}
    chosen = [(group, getattr(choice, group)) for group in SINGLE] + [("distill", key) for key in choice.distill]
    settings = [SETTINGS.get(key, {}) for _, key in chosen] + [{} if choice.loop == NONE else SETTINGS["loop"]]
    for each in (*(FILES[part] for part in chosen), *settings, {"distill": list(choice.distill)}):
        raw |= {key: raw.get(key, {}) | value if isinstance(value, dict) else value for key, value in each.items()}
    return OmegaConf.create(raw)


@pytest.fixture(scope="module")
def examples(problems: list[Problem], tokenizer: Tokenizer) -> list[Problem]:
    """Of two steps, of none, and of more than there are groups."""
    return [problems[0], problems[1], problems[3]]


@pytest.fixture(scope="module")
def plain() -> RunConfig:
    """What all methods share."""
    return parse(composed(Choice(NONE, NONE, NONE, NONE, ())))[0]


def try_out(choice: Choice, tokenizer: Tokenizer, problems: Sequence[Problem]) -> str | None:
    """Trains a choice and answers a question with it; what a command says before it loads anything, if it refuses."""
    try:
        run, config = parse(composed(choice))
    except UserError as error:
        return str(error)
    method = train(run, config, tokenizer, problems).eval()
    (found,) = generate(as_checkpoint(method, method.last_stage, {}, 0), ["How many?"], 2)
    assert 1 <= found.n_tokens - found.n_thoughts <= 2
    assert found.n_thoughts == method.last_stage.thoughts or choice.loop == "compressed"
    return None


def train(run: RunConfig, config: MethodConfig, tokenizer: Tokenizer, problems: Sequence[Problem]) -> Method:
    """An optimizer step of two micro-batches at each of `PROGRESS`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, context_length=160, n_layer=1, n_head=2, n_embd=16))
    method = Method(model, tokenizer, run, config)
    examples: list[Example] = [method.encode(problem) for problem in problems]
    optimizers = make_optimizers(method, run)
    method.curriculum.begin(20, 40)
    before = method.stage_at(0.0)
    for step, progress in enumerate(PROGRESS[before == method.last_stage :]):
        stage = method.stage_at(progress)
        if stage != before:
            method.begin_stage(before, stage)
            before = stage
        method.begin_step(step, 0)
        batches = []
        for rows in ([1], [0, 2]):
            seeds = Seeds.of(0, step, rows)
            batches.append(method.collate([examples[row] for row in rows], method.stages_of(progress, seeds), seeds))
        totals = add_up([batch.totals for batch in batches])
        for batch in batches:
            assert isinstance(batch, ThoughtBatch) == (stage.thoughts > 0)
            shares = method(batch, totals)
            assert all(value.isfinite().all() for value in shares.values()), shares
            shares["loss"].backward()
            for name, parameter in method.named_parameters():
                if stage.thoughts > 0:  # DDP is not told to look for idle ones then, also of a problem without steps
                    assert parameter.grad is not None, f"{name} takes no part"
                assert parameter.grad is None or parameter.grad.isfinite().all(), name
        weights = [parameter.detach().clone() for parameter in method.parameters()]
        assert update(method.parameters(), optimizers, 1.0).isfinite()
        moved = [not torch.equal(old, new) for old, new in zip(weights, method.parameters(), strict=True)]
        assert any(moved)
    return method


@pytest.mark.parametrize("choices", BY_CURRICULUM_AND_LOOP)
def test_every_choice_is_trained_or_refused(
    choices: list[Choice], tokenizer: Tokenizer, examples: list[Problem], plain: RunConfig
) -> None:
    for choice in choices:
        rules = refusals(choice)
        try:
            said = try_out(choice, tokenizer, examples)
        except Exception as error:
            raise AssertionError(f"{choice}: {type(error).__name__}: {error}") from error
        if said is None:
            assert not rules, f"{choice}: is trained, against {rules}"
            continue
        assert rules, f"{choice}: is refused: {said}"
        assert "\n" not in said
        assert any(all(word in said for word in named) for named in rules), f"{choice}: {said!r} names none of {rules}"
        assert any(words in said for words in ("; take ", ": must be ")), f"{choice}: {said!r} says not what is right"
        with pytest.raises(UserError) as caught:  # of a method that is put together by hand, too
            train(plain, MethodConfig(**choice.parts), tokenizer, examples)
        assert str(caught.value) == said


def test_the_rules_leave_what_is_published() -> None:
    """Were a rule too wide, with the code, nothing else here would tell."""
    allowed = [choice for choice in CHOICES if not refusals(choice)]
    assert len(CHOICES) == 4 * 8 * 4 * 2 * 4
    assert len(allowed) == 2 + 3 * 2 * (3 * 3 * 4 + 3 * 2 + 2 * 2 * 2 + 2)
