"""`data=arithmetic`: GSM8K-like word problems, made here, so that nothing has to be downloaded.

A problem is a chain of numbers and operations, drawn first, told in the sentences of `situations.py`. Each link of the
chain works on the result of the one before:

    Mia has 8 shells. She finds 4 more shells. Ben has 3 times as many shells as Mia. How many shells does he have now?
    8+4=12, 3*12=36

**Splits are disjoint by construction.** A digest of the chain says to which split it belongs, and a problem of a split
is drawn again until its chain does. So the calculations of a test problem are those of no training problem, whatever
the situation, the wording or the seed.

**The same everywhere.** A problem depends on nothing but the settings, the split and its index: the digest is BLAKE2,
and only `random.Random.random` is used, which Python promises not to change for a seed.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, TypeVar

from simcot_latent.data.problem import Problem, Step
from simcot_latent.data.sources import SPLITS, LoadedSplit, Split
from simcot_latent.data.sources.situations import (
    BOX_VERBS,
    GROUP_WORKINGS,
    MEN,
    MONEY,
    MONEY_WORDS,
    SITUATIONS,
    WOMEN,
    Move,
    Situation,
    Words,
)
from simcot_latent.errors import UserError

OPERATIONS = ("+", "-", "*", "/")

MAX_STEPS = 8
"""The longest chain for which every kind of situation but days has enough names."""

MAX_PROBLEMS = 10_000_000
"""The most problems of a split, which are all made when it is loaded."""

MAX_DRAWS = 20_000
"""Draws of a chain before the settings count as impossible. One chain in 20 is of the test split, so a split that has
any chain worth speaking of is hit long before."""

NUMBERS_PER_PLAN = 10
"""Draws of numbers for the same operations, so that operations that seldom fit, as divisions, are not much rarer."""

Draw = Callable[[], float]
"""A source of random numbers in [0, 1)."""

_T = TypeVar("_T")


@dataclass
class Arithmetic:
    """Made-up word problems. Every field is a key of `configs/data/arithmetic.yaml`.

    Attributes:
        seed: seed of the data, separate from that of a run. Splits are disjoint across seeds too.
        train_size, validation_size, test_size: problems in each split.
        min_steps, max_steps: length of the chain, each length equally often (1 to 8).
        operations: the operations to draw from, among `+`, `-`, `*`, `/`.
        max_number: largest first number, and largest number added or taken away.
        max_factor: largest number to multiply or divide by, and largest number and size of groups; at most
            `max_number`.
        max_result: largest result of any step. Divisions are exact, and no result is below 1.
        branching: share of the problems of two steps or more in which a second quantity is worked out and then added
            or taken away, as in "She buys 3 bags of 4 shells.": two of the problem's steps.
        distractors: share of problems with a sentence whose number is not used.

    Raises:
        UserError: a value is impossible.
    """

    seed: int = 0
    train_size: int = 72_000
    validation_size: int = 500
    test_size: int = 500
    min_steps: int = 2
    max_steps: int = 4
    operations: Sequence[str] = OPERATIONS
    max_number: int = 9
    max_factor: int = 4
    max_result: int = 40
    branching: float = 0.05
    distractors: float = 0.15

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0)
        for name in ("train_size", "validation_size", "test_size"):
            _check_whole(name, getattr(self, name), 1, MAX_PROBLEMS)
        _check_whole("min_steps", self.min_steps, 1, MAX_STEPS)
        _check_whole("max_steps", self.max_steps, self.min_steps, MAX_STEPS)
        _check_whole("max_number", self.max_number, 2, 1_000_000)
        _check_whole("max_factor", self.max_factor, 2, min(self.max_number, 1000))
        _check_whole("max_result", self.max_result, 2, 1_000_000)
        for name in ("branching", "distractors"):
            _check_share(name, getattr(self, name))
        if isinstance(self.operations, str) or not isinstance(self.operations, Sequence):
            raise UserError(f"data.operations is {self.operations!r}; it must be a list of {', '.join(OPERATIONS)}")
        self.operations = tuple(self.operations)
        if not self.operations or len(set(self.operations)) < len(self.operations):
            raise UserError("data.operations must name at least one operation, and none twice")
        for operation in self.operations:
            if operation not in OPERATIONS:
                raise UserError(f"data.operations has {operation!r}; allowed are {', '.join(OPERATIONS)}")
        self._joining = tuple(op for op in self.operations if op in "+-") if "*" in self.operations else ()
        if self.branching > 0 and not self._joining:
            raise UserError("data.branching must be 0 where data.operations does not have * and one of + and -")

    def load(self, split: Split) -> LoadedSplit:
        """All problems of `split`, in the order of their index.

        Raises:
            UserError: there is no such split, or the settings leave it without chains.
        """
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
        size = {"train": self.train_size, "validation": self.validation_size, "test": self.test_size}[split]
        return LoadedSplit([self.problem(split, index) for index in range(size)])

    def problem(self, split: Split, index: int) -> Problem:
        """Problem `index` (0, 1, ...; not bounded by the size) of `split`.

        Raises:
            UserError: no chain that fits the settings is in the split.
        """
        draw = random.Random(f"{self.seed} {split} {index}").random
        n_steps = _between(draw, self.min_steps, self.max_steps)
        branching = n_steps > 1 and draw() < self.branching
        chain = self._draw_chain(split, draw, n_steps, branching)
        distractor = None
        if draw() < self.distractors:  # numbers that also do for a child's age
            distractor = _between(draw, min(6, self.max_number), min(16, self.max_number))
        return _tell(draw, chain, distractor)

    def _draw_chain(self, split: Split, draw: Draw, n_steps: int, branching: bool) -> "Chain":
        """The first drawn chain of `n_steps` steps that fits the settings and belongs to `split`."""
        for _ in range(MAX_DRAWS // NUMBERS_PER_PLAN):
            plan = [_pick(draw, self.operations) for _ in range(n_steps - branching)]
            branch_at = -1
            if branching:
                branch_at = _between(draw, 0, len(plan) - 1)
                plan[branch_at] = _pick(draw, self._joining)
            for _ in range(NUMBERS_PER_PLAN):
                chain = self._draw_numbers(draw, plan, branch_at)
                if chain is not None and split_of(chain) == split:
                    return chain
        raise UserError(
            f"data: no chain of {n_steps} steps for the {split} split was found in {MAX_DRAWS} draws; "
            "raise data.max_result or data.max_number, lower data.max_steps, or allow more data.operations"
        )

    def _draw_numbers(self, draw: Draw, plan: Sequence[str], branch_at: int) -> "Chain | None":
        """Numbers for the operations of `plan`; None where the draw came to a dead end."""
        start = value = _between(draw, 2, min(self.max_number, self.max_result))
        links: list[Link] = []
        for position, operation in enumerate(plan):
            # Only the last result may be 1: nothing can be taken from it, and multiplied it gives the number away.
            least = 1 if position == len(plan) - 1 else 2
            if position == branch_at:
                link = Link(operation, _between(draw, 2, self.max_factor), _between(draw, 2, self.max_factor))
            else:
                numbers = self._numbers(operation, value, least)
                if not numbers:
                    return None
                link = Link(operation, _pick(draw, numbers))
                if links and link.undoes(links[-1]):
                    return None
            value = link.apply(value)
            if not least <= value <= self.max_result:
                return None
            links.append(link)
        if value < 9 and draw() * 10 > value + 1:
            return None  # far more chains end in a small number than in a large one: without this, 2 is a good guess
        return Chain(start, tuple(links))

    def _numbers(self, operation: str, value: int, least: int) -> Sequence[int]:
        """What can be done to `value` with `operation` for a result of at least `least` within the limits."""
        if operation == "+":
            return range(2, min(self.max_number, self.max_result - value) + 1)
        if operation == "-":
            return range(2, min(self.max_number, value - least) + 1)
        if operation == "*":
            return range(2, min(self.max_factor, self.max_result // value) + 1)
        return _divisors(value, min(self.max_factor, value // 2))


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"data.{name} is {value!r}; it must be a whole number {limits}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"data.{name} is {value!r}; it must be a number from 0 to 1")


# --- chance ----------------------------------------------------------------------------------------------------------
# Of `random`, only `Random.random` gives the same numbers in every version of Python; all draws are made of it.


def _between(draw: Draw, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return low + int(draw() * (high - low + 1))


def _pick(draw: Draw, options: Sequence[_T]) -> _T:
    return options[int(draw() * len(options))]


def _sample(draw: Draw, options: Sequence[_T], count: int) -> list[_T]:
    """`count` different options, in any order."""
    pool = list(options)
    for i in range(count):
        j = _between(draw, i, len(pool) - 1)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]


# --- numbers ---------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """One link of a chain: an operation on the running quantity with `number`, or with `number * each`."""

    operation: str
    number: int
    each: int = 0
    """Size of the `number` groups of a second quantity; 0 where there is none."""

    @property
    def amount(self) -> int:
        return self.number * self.each if self.each else self.number

    def apply(self, value: int) -> int:
        if self.operation == "+":
            return value + self.amount
        if self.operation == "-":
            return value - self.amount
        return value * self.amount if self.operation == "*" else value // self.amount

    def undoes(self, before: "Link") -> bool:
        return self == Link(_INVERSE[before.operation], before.number, before.each)


_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


class Chain(NamedTuple):
    """The numbers and operations of a problem, without its words."""

    start: int
    links: tuple[Link, ...]


def split_of(chain: Chain) -> Split:
    """The one split that may hold `chain`: of all chains, 5% are for test, 5% for validation.

    It depends on the calculations alone, whichever operand comes first: 3*5 and 5*3 are of one split.
    """
    value = chain.start
    calculations: list[str] = []
    for link in chain.links:
        if link.each:
            calculations.append(_unordered(link.number, "*", link.each))
        calculations.append(_unordered(value, link.operation, link.amount))
        value = link.apply(value)
    digest = hashlib.blake2b(" ".join(calculations).encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") % 20
    return "test" if share == 0 else "validation" if share == 1 else "train"


def _unordered(a: int, operation: str, b: int) -> str:
    return f"{a}{operation}{b}" if a > b else f"{b}{operation}{a}"


@lru_cache(maxsize=1 << 16)
def _divisors(value: int, largest: int) -> tuple[int, ...]:
    """The divisors of `value` from 2 to `largest`."""
    return tuple(n for n in range(2, largest + 1) if value % n == 0)


# --- words -----------------------------------------------------------------------------------------------------------


def _tell(draw: Draw, chain: Chain, distractor: int | None) -> Problem:
    """The chain as a word problem; with a sentence about the number `distractor`, unless it is None."""
    branch = next((link.operation for link in chain.links if link.each), "")
    situation = _pick(draw, _situations(len(chain.links), branch))
    story = _Story(draw, situation, chain.start, n_holders=len(chain.links) + 1 if situation.family.hands_over else 2)
    links = list(chain.links)
    opening_moves = situation.family.opening_moves.get(links[0].operation)
    if opening_moves and not links[0].each and draw() < 0.5:
        story.open_with(links.pop(0), opening_moves)
    else:
        story.open()
    aside_before = _between(draw, 0, len(links))  # of the sentence for which link; the last is the question
    for position, link in enumerate(links):
        if position == aside_before and distractor is not None:
            story.digress(distractor)
        if link.each:
            story.join(link)
        else:
            story.move(link, may_pack=not any(later.each for later in links[position:]))
    if aside_before == len(links) and distractor is not None:
        story.digress(distractor)
    story.ask(last=chain.links[-1].operation)
    return story.problem()


@cache
def _situations(n_links: int, branch: str) -> tuple[Situation, ...]:
    """The situations with enough holders for `n_links` moves, and with a sentence for a second quantity if need be."""
    return tuple(
        situation
        for situation in SITUATIONS
        if (not branch or branch in situation.family.groups)
        and not (situation.family.hands_over and situation.holders and len(situation.holders) <= n_links)
    )


def _cast(draw: Draw, situation: Situation, count: int) -> tuple[Words, list[Words]]:
    """Who acts first, and at most `count` holders of the quantity, in order.

    Of people, women and men take turns, so that `she` or `he` is whoever was named last.
    """
    women, men = _sample(draw, WOMEN, (count + 1) // 2), _sample(draw, MEN, (count + 1) // 2)
    pairs = zip(women, men, strict=True) if draw() < 0.5 else zip(men, women, strict=True)
    people = [person for pair in pairs for person in pair][:count]
    if situation.holders is None:
        return people[0], people
    if situation.in_order:
        first = _between(draw, 0, len(situation.holders) - 1)
        return people[0], [*situation.holders[first:], *situation.holders[:first]][:count]
    return people[0], _sample(draw, situation.holders, min(count, len(situation.holders)))


class _Story:
    """A problem that is being told: the question and its solution grow sentence by sentence."""

    def __init__(self, draw: Draw, situation: Situation, start: int, n_holders: int) -> None:
        self.draw = draw
        self.family = situation.family
        self.asides = situation.asides
        person, self.holders = _cast(draw, situation, n_holders)
        self.slots: dict[str, object] = {**person, **situation.words, "start": start}
        self._meet_holder()
        self.value = start
        self.told: set[Move] = set()
        self.sentences: list[str] = []
        self.lines: list[str] = []
        self.steps: list[Step] = []
        self.length = 0  # of the lines so far, each with its line break

    def open(self) -> None:
        self._say(_pick(self.draw, self.family.openings))

    def open_with(self, link: Link, texts: Sequence[str]) -> None:
        """The opening and the first move in one sentence."""
        self._say(_pick(self.draw, texts), n=link.number)
        self._work_out(link, f"{self.value}{link.operation}{link.number}")

    def digress(self, number: int) -> None:
        self._say(_pick(self.draw, self.asides), n=number)

    def move(self, link: Link, may_pack: bool) -> None:
        """The next move, told in a way that is possible here and, if there is one, not yet used in this problem."""
        possible = [
            move
            for move in self.family.moves[link.operation]
            if (move.then != "next" or len(self.holders) > 1)
            and (move.then != "boxes" or (may_pack and "boxes" in self.slots))
        ]
        move = _pick(self.draw, [move for move in possible if move not in self.told] or possible)
        self.told.add(move)
        self._say(move.text, n=link.number)
        if move.then == "next":
            self.holders.pop(0)
            self._meet_holder()
        elif move.then == "boxes":
            self.slots.update(BOX_VERBS, thing=self.slots.pop("box"), things=self.slots.pop("boxes"))
        elif move.then == "money":
            self.family = MONEY
            self.slots.update(MONEY_WORDS)
        operands = (link.number, self.value) if move.number_first else (self.value, link.number)
        self._work_out(link, f"{operands[0]}{link.operation}{operands[1]}")

    def join(self, link: Link) -> None:
        """A second quantity, worked out in a step of its own, then added or taken away."""
        self._say(_pick(self.draw, self.family.groups[link.operation]), n=link.number, each=link.each)
        self._write(_pick(self.draw, GROUP_WORKINGS), f"{link.number}*{link.each}", link.amount)
        self._work_out(link, f"{self.value}{link.operation}{link.amount}")

    def ask(self, last: str) -> None:
        """The question; `last` is the last operation."""
        self._say(_pick(self.draw, self.family.questions + (self.family.questions_left if last == "-" else ())))

    def problem(self) -> Problem:
        return Problem(" ".join(self.sentences), tuple(self.steps), "\n".join(self.lines), str(self.value))

    def _meet_holder(self) -> None:
        self.slots.update(self.holders[0])
        if len(self.holders) > 1:
            self.slots.update(next=self.holders[1]["name"], Next=self.holders[1]["Name"])

    def _say(self, text: str, **numbers: int) -> None:
        self.sentences.append(text.format(**self.slots, **numbers))

    def _work_out(self, link: Link, expression: str) -> None:
        self.value = link.apply(self.value)
        self._write(_pick(self.draw, self.family.workings[link.operation]), expression, self.value)

    def _write(self, text: str, expression: str, result: int) -> None:
        """A line of the solution, with its step."""
        annotation = f"<<{expression}={result}>>"
        count = self.slots["thing" if result == 1 else "things"]
        line = text.format(**self.slots, calc=f"{expression}={annotation}{result}", count=count)
        start = self.length + line.index(annotation)
        self.steps.append(Step(expression, str(result), start, start + len(annotation)))
        self.lines.append(line)
        self.length += len(line) + 1
