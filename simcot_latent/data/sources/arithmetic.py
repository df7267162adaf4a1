"""`data=arithmetic`: GSM8K-like word problems, made here, so that nothing has to be downloaded.

A problem is a chain of numbers and operations, drawn first, then told in sentences (`data/word_problems`). Each link
of the chain works on the result of the one before:

    Mia has 8 shells. She finds 4 more shells. Ben has 3 times as many shells as Mia. How many shells does he have now?
    8+4=12, 3*12=36

**Splits are disjoint by construction.** A digest of the beginning of a chain, of its first calculation or its first
two, says to which split it belongs (see `split_of`), and a problem of a split is drawn again until its chain does. So
no chain of a test problem is that of a training problem, or begins one, or goes on from one (a training chain of a
single step may), whatever the situation, the wording, the seed or the other settings. The chains of a held-out split
are distinct, as long as there are new ones. The single steps of test problems are drawn as those of training problems
are, but for the share `unseen_steps`, which training never shows.

**Version 1**, which earlier checkpoints were trained on, takes the digest of the whole chain: there a test chain may be
the beginning of a training chain, and a split tells some of its chains several times.

**The same everywhere.** A problem depends on nothing but the settings, the split and its index: the digest is BLAKE2,
and only `random.Random.random` is used, which Python promises not to change for a seed.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from simcot_latent.data.lazy import Lazily
from simcot_latent.data.problem import Problem
from simcot_latent.data.sources import SPLITS, LoadedSplit, Split
from simcot_latent.data.word_problems.chains import (
    Calculations,
    Chain,
    Link,
    calculations_of,
    divisors,
    unordered,
)
from simcot_latent.data.word_problems.chance import Draw, between, pick, sample
from simcot_latent.data.word_problems.stories import tell
from simcot_latent.errors import UserError

OPERATIONS = ("+", "-", "*", "/")

MAX_STEPS = 8
"""The longest chain for which every kind of situation but days has enough names."""

MAX_PROBLEMS = 10_000_000
"""The most problems of a split; those of a held-out one are all made when it is loaded."""

MAX_DRAWS = 20_000
"""Draws of a chain before the settings count as impossible. At least one chain in 20 is of the test split, so a split
that has any chain worth speaking of is hit long before."""

HELD_OUT_STEPS = 5
"""One calculation in so many is kept from training where `unseen_steps` is above 0."""

NUMBERS_PER_PLAN = 10
"""Draws of numbers for the same operations, so that operations that seldom fit, as divisions, are not much rarer."""


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
            or taken away, as in "She buys 3 bags of 4 shells.": two of the problem's steps. (In version 2, a held-out
            split that has no new one left tells one without, unless the share is 1.)
        distractors: share of problems with a sentence whose number is not used.
        version: how problems are split: 2 keeps held-out chains from beginning training chains, or going on from them;
            1 keeps only whole chains apart. The class's default, 1, is what settings without a version mean, those of
            checkpoints from before there were two.
        unseen_steps: share of the steps of test problems that training and validation are kept from. Where it is above
            0, a fifth of all calculations is kept from both; where it is 0, none is. The other steps of test problems
            are drawn as those of training are.

    Raises:
        UserError: a value is impossible.
    """

    seed: int = 0
    train_size: int = 96_000
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
    version: int = 1
    unseen_steps: float = 0.0

    def __post_init__(self) -> None:
        _check_whole("seed", self.seed, 0)
        for name in ("train_size", "validation_size", "test_size"):
            _check_whole(name, getattr(self, name), 1, MAX_PROBLEMS)
        _check_whole("min_steps", self.min_steps, 1, MAX_STEPS)
        _check_whole("max_steps", self.max_steps, self.min_steps, MAX_STEPS)
        _check_whole("max_number", self.max_number, 2, 1_000_000)
        _check_whole("max_factor", self.max_factor, 2, min(self.max_number, 1000))
        _check_whole("max_result", self.max_result, 2, 1_000_000)
        _check_whole("version", self.version, 1, 2)
        for name in ("branching", "distractors", "unseen_steps"):
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
        if self.unseen_steps > 0 and self.version == 1:
            raise UserError(f"data.unseen_steps is {self.unseen_steps}; it must be 0 with data.version=1")
        self._held_out: dict[Split, _HeldOut] = {"validation": _HeldOut(), "test": _HeldOut()}

    def load(self, split: Split) -> LoadedSplit:
        """All problems of `split`, in the order of their index; those of train are made when they are asked for.

        Raises:
            UserError: there is no such split, or the settings leave it without chains.
        """
        problems = self._problems(split)
        if split == "train":
            self.problem(split, 0)  # settings that leave the split without chains end here, not in the middle of a run
            return LoadedSplit(problems)
        return self.load_first(split, None)

    def load_first(self, split: Split, limit: int | None) -> LoadedSplit:
        """The first `limit` problems of `split` (None: all); no others are made, and the notes are about these.

        Raises:
            UserError: see `load`.
        """
        made = self._problems(split)[:limit]
        if split == "train":
            return LoadedSplit(made)
        chains = {calculations_of(problem) for problem in made}
        notes = Counter({"problem with the calculations of another": len(made) - len(chains)})
        return LoadedSplit(made, +notes)

    def _problems(self, split: Split) -> Lazily[Problem]:
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
        size = {"train": self.train_size, "validation": self.validation_size, "test": self.test_size}[split]
        return Lazily(size, partial(self.problem, split))

    def problem(self, split: Split, index: int) -> Problem:
        """Problem `index` (0, 1, ...; not bounded by the size) of `split`.

        Raises:
            UserError: no chain that fits the settings is in the split.
        """
        if self.version == 1 or split == "train":
            return self._make(split, index, None)
        held_out = self._held_out[split]
        while len(held_out.problems) <= index:  # each depends on the chains before it
            held_out.problems.append(self._make(split, len(held_out.problems), held_out))
        return held_out.problems[index]

    def _make(self, split: Split, index: int, held_out: "_HeldOut | None") -> Problem:
        draw = random.Random(f"{self.seed} {split} {index}").random
        n_steps = between(draw, self.min_steps, self.max_steps)
        branching = n_steps > 1 and draw() < self.branching
        n_unseen = held_out.count_unseen(n_steps, self.unseen_steps) if held_out and split == "test" else 0
        chain = self._draw_chain(split, draw, _Kind(n_steps, branching, n_unseen), held_out)
        distractor = None
        if draw() < self.distractors:  # numbers that also do for a child's age
            distractor = between(draw, min(6, self.max_number), min(16, self.max_number))
        return tell(draw, chain, distractor)

    def _draw_chain(self, split: Split, draw: Draw, kind: "_Kind", held_out: "_HeldOut | None") -> "Chain":
        """The first drawn chain of a kind that fits the settings and belongs to `split`.

        In a held-out split the first that is new there. Where that has no new one any more: one without a second
        quantity, unless all problems are to have one; else one that was told before.
        """
        if held_out is not None and kind in held_out.used_up and kind.branching and self.branching < 1:
            return self._draw_chain(split, draw, kind._replace(branching=False), held_out)
        for _ in range(MAX_DRAWS // NUMBERS_PER_PLAN):
            plan = [pick(draw, self.operations) for _ in range(kind.n_steps - kind.branching)]
            branch_at = -1
            if kind.branching:
                branch_at = between(draw, 0, len(plan) - 1)
                plan[branch_at] = pick(draw, self._joining)
            unseen = None
            if self.unseen_steps > 0:
                steps = sample(draw, range(kind.n_steps), kind.n_unseen)
                unseen = [position in steps for position in range(kind.n_steps)]
            for _ in range(NUMBERS_PER_PLAN):
                chain = self._draw_numbers(draw, plan, branch_at, unseen)
                if chain is None:
                    continue
                calculations = chain.calculations()
                if split_of(calculations, self.version) != split:
                    continue
                if held_out is None or held_out.is_new(calculations) or kind in held_out.used_up:
                    return chain
        if held_out is not None and kind not in held_out.used_up:
            held_out.used_up.add(kind)
            return self._draw_chain(split, draw, kind, held_out)
        unseen, lower = (f", {kind.n_unseen} of them unseen,", " or data.unseen_steps") if kind.n_unseen else ("", "")
        raise UserError(
            f"data: no chain of {kind.n_steps} steps{unseen} for the {split} split was found in {MAX_DRAWS} draws; "
            f"raise data.max_result or data.max_number, lower data.max_steps{lower}, or allow more data.operations"
        )

    def _draw_numbers(
        self, draw: Draw, plan: Sequence[str], branch_at: int, unseen: Sequence[bool] | None
    ) -> "Chain | None":
        """Numbers for the operations of `plan`; None where the draw came to a dead end.

        Args:
            unseen: whether each step must be one that is kept from training, or must not; None: all the same.
        """
        start = value = between(draw, 2, min(self.max_number, self.max_result))
        links: list[Link] = []
        wanted = None if unseen is None else iter(unseen)
        for position, operation in enumerate(plan):
            # Only the last result may be 1: nothing can be taken from it, and multiplied it gives the number away.
            least = 1 if position == len(plan) - 1 else 2
            if position == branch_at:
                link = Link(operation, between(draw, 2, self.max_factor), between(draw, 2, self.max_factor))
                if wanted is not None and any(kept_from_training(c) != next(wanted) for c in link.calculations(value)):
                    return None
            else:
                numbers = self._numbers(operation, value, least)
                if wanted is not None:
                    keep = next(wanted)
                    numbers = [n for n in numbers if kept_from_training(unordered(value, operation, n)) == keep]
                if not numbers:
                    return None
                link = Link(operation, pick(draw, numbers))
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
        return divisors(value, min(self.max_factor, value // 2))


def _check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"data.{name} is {value!r}; it must be a whole number {limits}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"data.{name} is {value!r}; it must be a number from 0 to 1")


def split_of(calculations: Calculations, version: int) -> Split:
    """The one split that may hold a chain of these calculations.

    Version 1 goes by the whole chain: 5% of all chains are for test, 5% for validation.

    Version 2 goes by the beginning, so that all chains of one beginning are of one split: by the first calculation, of
    which 5% are for test and 5% for validation, and where it is of neither, by the first two: 15% and 15%. It is not
    the first two alone, since chains may be of a single step.
    """
    if version == 1:
        share = _digest(" ".join(calculations)) % 20
    else:
        share = _digest(calculations[0]) % 20
        if share > 1 and len(calculations) > 1:
            share = _digest(" ".join(calculations[:2])) % 20 // 3
    return "test" if share == 0 else "validation" if share == 1 else "train"


@lru_cache(maxsize=1 << 16)
def kept_from_training(calculation: str) -> bool:
    """Whether no training or validation problem may have this step, where `unseen_steps` is above 0."""
    return _digest(f"unseen {calculation}") % HELD_OUT_STEPS == 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class _Kind(NamedTuple):
    """What a chain is to be: its steps, whether it has a second quantity, and its steps that training never shows."""

    n_steps: int
    branching: bool
    n_unseen: int


class _HeldOut:
    """A held-out split as far as it is made: each problem depends on what those before it have told."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.chains: set[Calculations] = set()
        self.used_up: set[_Kind] = set()
        """The kinds of chain of which no new one was found any more."""
        self.steps = 0

    def is_new(self, calculations: Calculations) -> bool:
        """Whether no problem has told these calculations yet; from now on one has."""
        new = calculations not in self.chains
        self.chains.add(calculations)
        return new

    def count_unseen(self, n_steps: int, share: float) -> int:
        """How many of the next problem's steps are to be unseen, so that of all steps so far `share` are."""
        before, self.steps = self.steps, self.steps + n_steps
        return math.floor(share * self.steps + 0.5) - math.floor(share * before + 0.5)
