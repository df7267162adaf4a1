"""The language of the arithmetic source: what its problems are about, and the sentences they are told in.

A problem follows one running quantity. A `Situation` says what is counted and who has it; its `Family` holds the
sentences, shared by all situations of a kind. Sentences are format strings. Their slots:

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


@dataclass(frozen=True)
class Situation:
    """What a problem is about: the words of its sentences, who or what may have the quantity, what distracts."""

    name: str
    family: Family
    words: Words
    holders: tuple[Words, ...] | None
    """The slots of each possible holder; None: people."""
    asides: tuple[str, ...]
    """Sentences with a number, `{n}`, that is not used."""
    in_order: bool = False
    """Whether one holder follows the other, as days do; else in any order."""


# --- who -------------------------------------------------------------------------------------------------------------


def _person(name: str, they: str, them: str, their: str) -> Words:
    pronouns = {"they": they, "They": they.capitalize(), "them": them, "their": their}
    return {"name": name, "Name": name, "who": name, **pronouns}


_WOMEN = ("Mia", "Ana", "Zoe", "Eva", "Lily", "Emma", "Nora", "Ruth", "Kate", "Jane", "Lucy", "Rosa")
_MEN = ("Ben", "Tom", "Leo", "Max", "Adam", "Paul", "Jack", "Omar", "Luis", "Ivan", "Finn", "Hugo")

WOMEN = tuple(_person(name, "she", "her", "her") for name in _WOMEN)
MEN = tuple(_person(name, "he", "him", "his") for name in _MEN)


def _holders(*names: str) -> tuple[Words, ...]:
    return tuple({"name": name, "Name": name[0].upper() + name[1:]} for name in names)


# --- sentences by family ---------------------------------------------------------------------------------------------


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


# --- situations ------------------------------------------------------------------------------------------------------

_ANYONE = (
    "{who} is {n} years old.",
    "{who} has {n} cousins.",
    "{who} lives at number {n}.",
    "It is {n} degrees outside.",
)


def _keeper(thing: str, things: str, box: str, boxes: str, gets: str, gets2: str, loses: str, loses2: str) -> Situation:
    words = {"thing": thing, "things": things, "box": box, "boxes": boxes}
    words |= {"gets": gets, "gets2": gets2, "loses": loses, "loses2": loses2}
    return Situation(things, KEEPER, words, holders=None, asides=(*_ANYONE, "{who} also has {n} spoons."))


def _place(
    place: str, thing: str, things: str, box: str, boxes: str, gets: str, gets2: str, loses: str, loses2: str
) -> Situation:
    words = {"place": place, "thing": thing, "things": things, "box": box, "boxes": boxes}
    words |= {"gets": gets, "gets2": gets2, "loses": loses, "loses2": loses2}
    holder = {"name": f"the {place}", "Name": f"The {place}", "they": "it", "They": "It", "them": "it", "their": "its"}
    asides = ("It opened {n} years ago.", "It has {n} windows.", "It has {n} workers.")
    return Situation(place, PLACE, words, holders=(holder,), asides=asides)


def _crowd(preposition: str, place: str, thing: str, things: str, come: str, leave: str) -> Situation:
    words = {"thing": thing, "things": things, "come": come, "leave": leave}
    words |= {"place": f"{preposition} a {place}", "spot": f"{preposition} the {place}"}
    asides = ("It is {n} degrees outside.", "The nearest town is {n} miles away.", "It has rained for {n} days.")
    return Situation(place, CROWD, words, holders=({},), asides=asides)


_WEEK = _holders("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _days(do: str, does: str, thing: str, things: str) -> Situation:
    words = {"do": do, "does": does, "thing": thing, "things": things}
    return Situation(things, DAYS, words, holders=_WEEK, asides=_ANYONE, in_order=True)


def _comparison(
    name: str,
    has: str,
    ask: tuple[str, str],
    thing: str,
    things: str,
    comparatives: tuple[str, str, str],
    holders: tuple[Words, ...] | None,
    aside: str,
) -> Situation:
    more, less, as_much = comparatives
    words = {"has": has, "does": ask[0], "have": ask[1], "thing": thing, "things": things}
    words |= {"more": more, "less": less, "as_much": as_much}
    return Situation(name, COMPARISON, words, holders, (aside, "It is {n} degrees outside."))


def _colored(thing: str) -> tuple[Words, ...]:
    colors = ("red", "blue", "green", "white", "black", "yellow", "brown", "gray", "pink")
    return _holders(*(f"the {color} {thing}" for color in colors))


_GOODS = _holders(
    "the pen", "the book", "the bag", "the hat", "the lamp", "the ball", "the cup", "the scarf", "the vase"
)  # fmt: skip
_SIGHTS = _holders(
    "the lake", "the castle", "the mill", "the farm", "the beach", "the bridge", "the park", "the zoo", "the fort"
)  # fmt: skip


SITUATIONS: tuple[Situation, ...] = (
    # thing, things, box, boxes, two ways to get them, two ways to lose them
    _keeper("shell", "shells", "jar", "jars", "finds", "collects", "loses", "gives away"),
    _keeper("stamp", "stamps", "album", "albums", "buys", "finds", "sells", "loses"),
    _keeper("marble", "marbles", "bag", "bags", "wins", "buys", "loses", "gives away"),
    _keeper("sticker", "stickers", "pack", "packs", "buys", "wins", "uses", "gives away"),
    _keeper("coin", "coins", "jar", "jars", "finds", "collects", "loses", "gives away"),
    _keeper("card", "cards", "pack", "packs", "buys", "wins", "loses", "sells"),
    _keeper("cookie", "cookies", "tray", "trays", "bakes", "buys", "eats", "gives away"),
    _keeper("muffin", "muffins", "box", "boxes", "bakes", "buys", "sells", "eats"),
    _keeper("apple", "apples", "basket", "baskets", "picks", "buys", "eats", "sells"),
    _keeper("plum", "plums", "bowl", "bowls", "picks", "buys", "eats", "gives away"),
    _keeper("tomato", "tomatoes", "crate", "crates", "picks", "grows", "uses", "sells"),
    _keeper("carrot", "carrots", "sack", "sacks", "grows", "buys", "uses", "eats"),
    _keeper("egg", "eggs", "carton", "cartons", "gathers", "buys", "breaks", "uses"),
    _keeper("flower", "flowers", "bunch", "bunches", "picks", "grows", "sells", "gives away"),
    _keeper("pencil", "pencils", "box", "boxes", "buys", "finds", "breaks", "loses"),
    _keeper("bead", "beads", "bag", "bags", "buys", "finds", "uses", "loses"),
    _keeper("balloon", "balloons", "pack", "packs", "buys", "wins", "pops", "gives away"),
    _keeper("button", "buttons", "tin", "tins", "finds", "buys", "uses", "loses"),
    _keeper("candle", "candles", "box", "boxes", "makes", "buys", "burns", "sells"),
    _keeper("toy car", "toy cars", "case", "cases", "buys", "wins", "breaks", "sells"),
    _keeper("block", "blocks", "bin", "bins", "buys", "finds", "loses", "uses"),
    _keeper("nut", "nuts", "sack", "sacks", "gathers", "buys", "eats", "drops"),
    _keeper("photo", "photos", "album", "albums", "prints", "takes", "loses", "sells"),
    _keeper("sandwich", "sandwiches", "plate", "plates", "makes", "buys", "eats", "sells"),
    # place, then as above
    _place("library", "book", "books", "box", "boxes", "buys", "gets", "lends out", "sells"),
    _place("bakery", "loaf", "loaves", "tray", "trays", "bakes", "buys", "sells", "throws out"),
    _place("toy shop", "doll", "dolls", "crate", "crates", "orders", "buys", "sells", "gives away"),
    _place("farm", "hen", "hens", "cage", "cages", "buys", "raises", "sells", "loses"),
    _place("school", "chair", "chairs", "stack", "stacks", "buys", "gets", "sells", "throws out"),
    _place("cafe", "cup", "cups", "box", "boxes", "buys", "orders", "breaks", "sells"),
    _place("hotel", "towel", "towels", "set", "sets", "orders", "buys", "loses", "throws out"),
    _place("museum", "vase", "vases", "crate", "crates", "buys", "gets", "sells", "lends out"),
    # where, who, how they come and leave
    _crowd("at", "party", "guest", "guests", "arrive", "go home"),
    _crowd("on", "bus", "rider", "riders", "get on", "get off"),
    _crowd("in", "pool", "swimmer", "swimmers", "jump in", "climb out"),
    _crowd("on", "pond", "duck", "ducks", "fly in", "fly off"),
    _crowd("at", "camp", "scout", "scouts", "arrive", "leave"),
    _crowd("in", "harbor", "boat", "boats", "sail in", "sail out"),
    # what is done day by day
    _days("run", "runs", "lap", "laps"),
    _days("read", "reads", "page", "pages"),
    _days("cycle", "cycles", "mile", "miles"),
    _days("learn", "learns", "word", "words"),
    _days("plant", "plants", "tree", "trees"),
    _days("wash", "washes", "window", "windows"),
    _days("solve", "solves", "puzzle", "puzzles"),
    _days("deliver", "delivers", "letter", "letters"),
    # savings
    Situation("savings", MONEY, MONEY_WORDS, holders=None, asides=_ANYONE),
    # what is compared
    _comparison(
        "points", "has", ("does", " have"), "point", "points", ("more points", "fewer points", "as many points"),
        holders=None, aside="The game lasts {n} minutes.",
    ),
    _comparison(
        "ages", "is", ("is", ""), "year old", "years old", ("years older", "years younger", "as old"),
        holders=None, aside="The school has {n} rooms.",
    ),
    _comparison(
        "ropes", "is", ("is", ""), "foot long", "feet long", ("feet longer", "feet shorter", "as long"),
        holders=_colored("rope"), aside="The shed has {n} shelves.",
    ),
    _comparison(
        "towers", "is", ("is", ""), "block tall", "blocks tall", ("blocks taller", "blocks shorter", "as tall"),
        holders=_colored("tower"), aside="The room has {n} shelves.",
    ),
    _comparison(
        "weights", "weighs", ("does", " weigh"), "kilo", "kilos", ("kilos more", "kilos less", "as much"),
        holders=_colored("box"), aside="The room has {n} windows.",
    ),
    _comparison(
        "tanks", "holds", ("does", " hold"), "liter", "liters", ("liters more", "liters less", "as much"),
        holders=_colored("tank"), aside="The yard has {n} lamps.",
    ),
    _comparison(
        "prices", "costs", ("does", " cost"), "dollar", "dollars", ("dollars more", "dollars less", "as much"),
        holders=_GOODS, aside="The shop has {n} clerks.",
    ),
    _comparison(
        "distances", "is", ("is", ""), "mile away", "miles away", ("miles farther away", "miles nearer", "as far away"),
        holders=_SIGHTS, aside="The map is {n} years old.",
    ),
)  # fmt: skip
