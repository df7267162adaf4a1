"""What made-up word problems are about: what is counted, who or what may have it, and what distracts."""

from dataclasses import dataclass

from simcot_latent.data.word_problems.sentences import (
    COMPARISON,
    CROWD,
    DAYS,
    KEEPER,
    MONEY,
    MONEY_WORDS,
    PLACE,
    Family,
    Words,
)


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


# --- who --------------------------------------------------------------------------------------------------------------


def _person(name: str, they: str, them: str, their: str) -> Words:
    pronouns = {"they": they, "They": they.capitalize(), "them": them, "their": their}
    return {"name": name, "Name": name, "who": name, **pronouns}


_WOMEN = ("Mia", "Ana", "Zoe", "Eva", "Lily", "Emma", "Nora", "Ruth", "Kate", "Jane", "Lucy", "Rosa")
_MEN = ("Ben", "Tom", "Leo", "Max", "Adam", "Paul", "Jack", "Omar", "Luis", "Ivan", "Finn", "Hugo")

WOMEN = tuple(_person(name, "she", "her", "her") for name in _WOMEN)
MEN = tuple(_person(name, "he", "him", "his") for name in _MEN)


def _holders(*names: str) -> tuple[Words, ...]:
    return tuple({"name": name, "Name": name[0].upper() + name[1:]} for name in names)


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
