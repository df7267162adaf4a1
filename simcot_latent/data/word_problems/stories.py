"""A chain of numbers, told as a word problem with its written solution."""

from collections.abc import Sequence
from functools import cache

from simcot_latent.data.problem import Problem, Step
from simcot_latent.data.word_problems.chains import Chain, Link
from simcot_latent.data.word_problems.chance import Draw, between, pick, sample
from simcot_latent.data.word_problems.sentences import BOX_VERBS, GROUP_WORKINGS, MONEY, MONEY_WORDS, Move, Words
from simcot_latent.data.word_problems.situations import MEN, SITUATIONS, WOMEN, Situation


def tell(draw: Draw, chain: Chain, distractor: int | None) -> Problem:
    """The chain as a word problem; with a sentence about the number `distractor`, unless it is None."""
    branch = next((link.operation for link in chain.links if link.each), "")
    situation = pick(draw, _situations(len(chain.links), branch))
    story = _Story(draw, situation, chain.start, n_holders=len(chain.links) + 1 if situation.family.hands_over else 2)
    links = list(chain.links)
    opening_moves = situation.family.opening_moves.get(links[0].operation)
    if opening_moves and not links[0].each and draw() < 0.5:
        story.open_with(links.pop(0), opening_moves)
    else:
        story.open()
    aside_before = between(draw, 0, len(links))  # of the sentence for which link; the last is the question
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
    women, men = sample(draw, WOMEN, (count + 1) // 2), sample(draw, MEN, (count + 1) // 2)
    pairs = zip(women, men, strict=True) if draw() < 0.5 else zip(men, women, strict=True)
    people = [person for pair in pairs for person in pair][:count]
    if situation.holders is None:
        return people[0], people
    if situation.in_order:
        first = between(draw, 0, len(situation.holders) - 1)
        return people[0], [*situation.holders[first:], *situation.holders[:first]][:count]
    return people[0], sample(draw, situation.holders, min(count, len(situation.holders)))


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
        self._say(pick(self.draw, self.family.openings))

    def open_with(self, link: Link, texts: Sequence[str]) -> None:
        """The opening and the first move in one sentence."""
        self._say(pick(self.draw, texts), n=link.number)
        self._work_out(link, f"{self.value}{link.operation}{link.number}")

    def digress(self, number: int) -> None:
        self._say(pick(self.draw, self.asides), n=number)

    def move(self, link: Link, may_pack: bool) -> None:
        """The next move, told in a way that is possible here and, if there is one, not yet used in this problem."""
        possible = [
            move
            for move in self.family.moves[link.operation]
            if (move.then != "next" or len(self.holders) > 1)
            and (move.then != "boxes" or (may_pack and "boxes" in self.slots))
        ]
        move = pick(self.draw, [move for move in possible if move not in self.told] or possible)
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
        self._say(pick(self.draw, self.family.groups[link.operation]), n=link.number, each=link.each)
        self._write(pick(self.draw, GROUP_WORKINGS), f"{link.number}*{link.each}", link.amount)
        self._work_out(link, f"{self.value}{link.operation}{link.amount}")

    def ask(self, last: str) -> None:
        """The question; `last` is the last operation."""
        self._say(pick(self.draw, self.family.questions + (self.family.questions_left if last == "-" else ())))

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
        self._write(pick(self.draw, self.family.workings[link.operation]), expression, self.value)

    def _write(self, text: str, expression: str, result: int) -> None:
        """A line of the solution, with its step."""
        annotation = f"<<{expression}={result}>>"
        count = self.slots["thing" if result == 1 else "things"]
        line = text.format(**self.slots, calc=f"{expression}={annotation}{result}", count=count)
        start = self.length + line.index(annotation)
        self.steps.append(Step(expression, str(result), start, start + len(annotation)))
        self.lines.append(line)
        self.length += len(line) + 1
