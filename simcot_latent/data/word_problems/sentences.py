"""The sentences of made-up word problems, by the kind of situation that they fit.

A problem follows one running quantity. A `Family` holds the sentences that all situations of a kind share. Sentences
are format strings. Their slots:

    {start} {n}        the first number; the number of a move
    {n} {each}         of a group sentence: `n` groups of `each`
    {name} {Name}      who or what has the running quantity now (a person, a place, a day, a rope)
    {next} {Next}      the next one; a move that names it hands the running quantity over
    {who}              the person who acts
    {they} {They} {them} {their}   pronouns of who or what acts: "she", "he" or "it", and so on
    {things} {count}   what is counted: plural; of the right number for a result
    {calc}             of a working: the annotated calculation
    others             the situation's own words

Numbers of a question are at least 2, so its nouns are always plural. Sentences name what they count, so that a
distractor before them does not change what they mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Words = Mapping[str, str]
"""What the slots of a sentence stand for."""

Then = Literal["same", "next", "boxes", "money"]
"""What the running quantity is after a move: of the same things, of the next holder, of boxes, of dollars."""


class Move(NamedTuple):
    """A sentence that changes the running quantity by the number `{n}`."""

    text: str
    then: Then
    number_first: bool
    """Whether its step reads `n*quantity`, as one would say "3 times as many"; else `quantity*n`."""


@dataclass(frozen=True)
class Family:
    """Sentences for situations of one kind. Mappings go by operation: `+`, `-`, `*`, `/`.

    Every operation has a move that is always possible, whatever came before: one with `then == "same"`, or, where
    `hands_over` is set, one with `then == "next"`.
    """

    openings: tuple[str, ...]
    moves: Mapping[str, tuple[Move, ...]]
    questions: tuple[str, ...]
    workings: Mapping[str, tuple[str, ...]]
    opening_moves: Mapping[str, tuple[str, ...]]
    """Openings that tell the first move as well (`{start}` and `{n}`)."""
    groups: Mapping[str, tuple[str, ...]]
    """Sentences for a second quantity, `{n}*{each}`, that is added to the running one or taken from it."""
    questions_left: tuple[str, ...]
    """Further questions for a problem that ends in `-`."""
    hands_over: bool
    """Whether every move goes on to the next holder."""


def _moves(**texts: Sequence[str]) -> Mapping[str, tuple[Move, ...]]:
    """Moves by operation; what comes after a move shows in the slots that its text has."""
    names = {"plus": "+", "minus": "-", "times": "*", "over": "/"}
    return {names[key]: tuple(_move(text, names[key]) for text in group) for key, group in texts.items()}


def _move(text: str, operation: str) -> Move:
    then: Then = "same"
    if "{next}" in text or "{Next}" in text:
        then = "next"
    elif "{boxes}" in text:
        then = "boxes"
    elif "dollars each" in text:
        then = "money"
    return Move(text, then, number_first=operation == "*" and "{n} times" in text)


_NOW_HAS = {
    "+": ("{Name} now has {calc} {count}.", "That makes {calc} {count}."),
    "-": ("{Name} has {calc} {count} left.", "That leaves {calc} {count}."),
    "*": ("{Name} has {calc} {count}.", "That makes {calc} {count}."),
    "/": ("{Name} has {calc} {count}.", "That is {calc} {count}."),
}
_HAS_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} does {they} have now?",
    "How many {things} does {name} have in the end?",
)
_HAS_LEFT_QUESTIONS = ("How many {things} does {name} have left?", "How many {things} does {they} have left?")

KEEPER = Family(
    openings=("{Name} has {start} {things}.", "{Name} {gets} {start} {things}.", "{Name} owns {start} {things}."),
    opening_moves={
        "+": (
            "{Name} has {start} big and {n} small {things}.",
            "{Name} {gets} {start} {things} on Monday and {n} on Tuesday.",
            "{Name} has {start} {things} and {gets} {n} more.",
        ),
        "-": ("{Name} has {start} {things} and {loses} {n}.",),
        "*": ("{Name} has {start} {boxes} of {n} {things} each.", "{Name} {gets} {start} {boxes} of {n} {things}."),
    },
    moves=_moves(
        plus=(
            "{They} {gets} {n} more {things}.",
            "Then {they} {gets2} {n} more {things}.",
            "A friend gives {them} {n} {things}.",
        ),
        minus=(
            "{They} {loses} {n} {things}.",
            "Then {they} {loses2} {n} of the {things}.",
            "A friend takes {n} of {their} {things}.",
        ),
        times=(
            "{Next} has {n} times as many {things} as {name}.",
            "A month later {they} has {n} times as many {things}.",
            "Soon {they} has {n} times as many {things}.",
            "{They} sells all {their} {things} for {n} dollars each.",
        ),
        over=(
            "{Next} has 1/{n} as many {things} as {name}.",
            "Now {they} has {n} times as many {things} as {next}.",
            "{They} keeps only 1/{n} of {their} {things}.",
            "{They} splits {their} {things} into {n} equal parts and keeps one part.",
            "{They} puts {their} {things} into {boxes} of {n}.",
        ),
    ),
    groups={
        "+": ("{They} {gets} {n} {boxes} of {each} {things}.", "A friend gives {them} {n} {boxes} of {each} {things}."),
        "-": ("{They} gives {n} friends {each} {things} each.",),
    },
    questions=_HAS_QUESTIONS,
    questions_left=_HAS_LEFT_QUESTIONS,
    workings=_NOW_HAS,
    hands_over=False,
)

PLACE = Family(
    openings=("A {place} has {start} {things}.", "There are {start} {things} at a {place}."),
    opening_moves={
        "+": ("A {place} has {start} old and {n} new {things}.", "A {place} has {start} {things} and {gets} {n} more."),
        "-": ("A {place} has {start} {things} and {loses} {n}.",),
        "*": ("A {place} has {start} {boxes} of {n} {things} each.",),
    },
    moves=_moves(
        plus=(
            "It {gets} {n} more {things}.",
            "Then it {gets2} {n} more {things}.",
            "A truck brings {n} more {things}.",
        ),
        minus=("It {loses} {n} {things}.", "Then it {loses2} {n} of the {things}.", "A truck takes away {n} {things}."),
        times=(
            "A month later it has {n} times as many {things}.",
            "Soon it has {n} times as many {things}.",
            "It sells all its {things} for {n} dollars each.",
        ),
        over=(
            "It keeps only 1/{n} of its {things}.",
            "It splits its {things} into {n} equal parts and keeps one part.",
            "It puts its {things} into {boxes} of {n}.",
        ),
    ),
    groups={
        "+": ("It {gets} {n} {boxes} of {each} {things}.", "A truck brings {n} {boxes} of {each} {things}."),
        "-": ("A truck takes away {n} {boxes} of {each} {things}.", "It sells {n} people {each} {things} each."),
    },
    questions=_HAS_QUESTIONS,
    questions_left=_HAS_LEFT_QUESTIONS,
    workings=_NOW_HAS,
    hands_over=False,
)

MONEY = Family(
    openings=("{Name} has {start} dollars.", "{Name} has saved {start} dollars.", "{Name} gets {start} dollars."),
    opening_moves={
        "+": ("{Name} has {start} dollars and gets {n} more.", "{Name} earns {start} dollars in May and {n} in June."),
        "-": ("{Name} has {start} dollars and spends {n}.",),
        "*": ("{Name} works {start} days for {n} dollars a day.",),
    },
    moves=_moves(
        plus=("{They} earns {n} dollars more.", "Then {they} gets {n} dollars.", "A friend gives {them} {n} dollars."),
        minus=(
            "{They} spends {n} dollars.",
            "Then {they} pays a bill of {n} dollars.",
            "{They} gives away {n} dollars.",
        ),
        times=(
            "{Next} has {n} times as much money as {name}.",
            "A month later {they} has {n} times as much money.",
            "Soon {they} has {n} times as much money.",
        ),
        over=(
            "{Next} has 1/{n} as much money as {name}.",
            "Now {they} has {n} times as much money as {next}.",
            "{They} keeps only 1/{n} of {their} money.",
            "{They} splits {their} money into {n} equal parts and keeps one part.",
        ),
    ),
    groups={
        "+": ("For {n} days {they} earns {each} dollars a day.",),
        "-": ("{They} buys {n} lamps for {each} dollars each.", "For {n} days {they} spends {each} dollars a day."),
    },
    questions=_HAS_QUESTIONS,
    questions_left=_HAS_LEFT_QUESTIONS,
    workings=_NOW_HAS,
    hands_over=False,
)

GROUP_WORKINGS = ("Those are {calc} {things}.", "That part is {calc} {things}.")
"""How the size of a second quantity is worked out, in any family that has one."""

BOX_VERBS: Words = {"gets": "gets", "gets2": "buys", "loses": "loses", "loses2": "gives away"}
"""What one does with the boxes once the things are in them."""

MONEY_WORDS: Words = {"thing": "dollar", "things": "dollars"}

CROWD = Family(
    openings=("There are {start} {things} {place}.", "{start} {things} are {place}."),
    opening_moves={
        "+": ("There are {start} {things} {place} and {n} more {come}.",),
        "-": ("There are {start} {things} {place} and {n} {leave}.",),
    },
    moves=_moves(
        plus=("{n} more {things} {come}.", "Then {n} {things} {come}."),
        minus=("{n} {things} {leave}.", "Then {n} of the {things} {leave}."),
        times=("Soon there are {n} times as many {things}.", "An hour later there are {n} times as many {things}."),
        over=(
            "Only 1/{n} of the {things} stay.",
            "Soon only 1/{n} of the {things} are left.",
            "The {things} form {n} equal groups and only one group stays.",
        ),
    ),
    groups={
        "+": ("{n} groups of {each} {things} {come}.", "Then {n} groups of {each} {things} {come}."),
        "-": ("{n} groups of {each} {things} {leave}.", "Then {n} groups of {each} {things} {leave}."),
    },
    questions=("How many {things} are there now?", "How many {things} are {spot} in the end?"),
    questions_left=("How many {things} are left {spot}?",),
    workings={
        "+": ("That makes {calc} {count}.", "The number of {things} is now {calc}."),
        "-": ("That leaves {calc} {count}.", "The number of {things} is now {calc}."),
        "*": ("That makes {calc} {count}.", "The number of {things} is now {calc}."),
        "/": ("That leaves {calc} {count}.", "The number of {things} is now {calc}."),
    },
    hands_over=False,
)

DAYS = Family(
    openings=("{who} {does} {start} {things} on {name}.", "On {name} {who} {does} {start} {things}."),
    opening_moves={},
    moves=_moves(
        plus=(
            "On {next} {they} {does} {n} more {things} than on {name}.",
            "{They} {does} {n} more {things} on {next} than on {name}.",
        ),
        minus=(
            "On {next} {they} {does} {n} fewer {things} than on {name}.",
            "{They} {does} {n} fewer {things} on {next} than on {name}.",
        ),
        times=(
            "On {next} {they} {does} {n} times as many {things} as on {name}.",
            "{They} {does} {n} times as many {things} on {next} as on {name}.",
        ),
        over=(
            "On {next} {they} {does} 1/{n} as many {things} as on {name}.",
            "{They} {does} 1/{n} as many {things} on {next} as on {name}.",
        ),
    ),
    groups={},
    questions=("How many {things} does {who} {do} on {name}?", "How many {things} does {they} {do} on {name}?"),
    questions_left=(),
    workings=dict.fromkeys("+-*/", ("On {name} {who} {does} {calc} {count}.", "That is {calc} {count} on {name}.")),
    hands_over=True,
)


COMPARISON = Family(
    openings=("{Name} {has} {start} {things}.",),
    opening_moves={},
    moves=_moves(
        plus=("{Next} {has} {n} {more} than {name}.", "Compared with {name}, {next} {has} {n} {more}."),
        minus=("{Next} {has} {n} {less} than {name}.", "Compared with {name}, {next} {has} {n} {less}."),
        times=(
            "{Next} {has} {n} times {as_much} as {name}.",
            "Compared with {name}, {next} {has} {n} times {as_much}.",
        ),
        over=("{Next} {has} 1/{n} {as_much} as {name}.", "Compared with {name}, {next} {has} 1/{n} {as_much}."),
    ),
    groups={},
    questions=("How many {things} {does} {name}{have}?", "Then how many {things} {does} {name}{have}?"),
    questions_left=(),
    workings=dict.fromkeys("+-*/", ("{Name} {has} {calc} {count}.", "So {name} {has} {calc} {count}.")),
    hands_over=True,
)
