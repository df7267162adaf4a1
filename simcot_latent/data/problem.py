"""A problem, its `<<expression=result>>` steps, and the numbers in them.

Everything is exact: numbers are `fractions.Fraction`, expressions go through a small parser of our own (no `eval`), and
every input is bounded in size, since what is read here may be the output of a half-trained model.

GSM8K's calculator annotations: https://arxiv.org/abs/2110.14168, section 4.1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_CHARS = 1000
"""Longest expression or number that is read. Without powers, a value has at most about as many digits as its text has
characters, so this bounds the work as well. The longest expression of GSM8K has 30 characters."""

MAX_DEPTH = 50
"""Deepest nesting of parentheses that is read."""


# --- expressions -----------------------------------------------------------------------------------------------------


class ExpressionError(ValueError):
    """The text is not an expression that has a value."""


_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"  # 7  7.00  7.  .5  1,000.5
_TOKEN = re.compile(rf"(?P<number>{_NUMBER})|(?P<operator>//|[-+*/()%])|\s+")

Number = int | Fraction  # whole numbers stay `int` while a value is worked out: several times faster than Fraction

_OPERATIONS: dict[str, Callable[[Number, Number], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a, b),
    "//": lambda a, b: a // b,
}


def _decimal(text: str) -> Number:
    """The value of a plain decimal such as `7.00`, `.5`, `3.` or `1,000`."""
    whole, _, decimals = text.replace(",", "").partition(".")
    value = int(whole + decimals)
    return Fraction(value, 10 ** len(decimals)) if decimals else value


class _Parser:
    """Recursive descent over one expression; `parse` fills `operators` and `operands` in the order of the text.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | "//") signed)*
    signed  = ("+" | "-")* atom
    atom    = (number | "(" sum ")") "%"?
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise ExpressionError(f"an expression of {len(text)} characters; at most {MAX_CHARS} are read")
        self.text = text
        self.tokens = _tokens(text)
        self.next = 0
        self.depth = 0
        self.operators: list[str] = []
        self.operands: list[Number] = []

    def parse(self) -> Number:
        """The value of the whole expression."""
        try:
            value = self.sum()
        except ZeroDivisionError:
            raise ExpressionError(f"division by zero in {self.text!r}") from None
        if self.tokens[self.next]:
            raise ExpressionError(f"unexpected {self.tokens[self.next]!r} in {self.text!r}")
        return value

    def accept(self, *wanted: str) -> str:
        """The next token if it is one of `wanted`, and move on; else the empty string."""
        token = self.tokens[self.next]
        if token not in wanted:
            return ""
        self.next += 1
        return token

    def sum(self) -> Number:
        return self.chain(self.product, "+", "-")

    def product(self) -> Number:
        return self.chain(self.signed, "*", "/", "//")

    def chain(self, part: Callable[[], Number], *operators: str) -> Number:
        value = part()
        while operator := self.accept(*operators):
            self.operators.append(operator)
            value = _OPERATIONS[operator](value, part())
        return value

    def signed(self) -> Number:
        sign = 1
        while token := self.accept("+", "-"):
            sign = -sign if token == "-" else sign
        first_operand, in_parentheses = len(self.operands), self.tokens[self.next] == "("
        value = sign * self.atom()
        if not in_parentheses:
            self.operands[first_operand:] = [value]  # the sign belongs to the number: 3*-5 has the operands 3 and -5
        return value

    def atom(self) -> Number:
        if self.accept("("):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"parentheses more than {MAX_DEPTH} deep in {self.text!r}")
            value = self.sum()
            if not self.accept(")"):
                raise ExpressionError(f"a parenthesis is not closed in {self.text!r}")
            self.depth -= 1
        else:
            token = self.tokens[self.next]
            if not token or token[-1] not in "0123456789.":
                raise ExpressionError(f"a number is missing before {token or 'the end'!r} in {self.text!r}")
            self.next += 1
            value = _decimal(token)
            self.operands.append(value)
        return Fraction(value, 100) if self.accept("%") else value


def _tokens(text: str) -> list[str]:
    """Numbers and operators of `text`, closed by an empty string."""
    tokens: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected {text[position]!r} in {text!r}")
        if match.lastgroup:
            tokens.append(match[0])
        position = match.end()
    return [*tokens, ""]


@lru_cache(maxsize=1 << 16)  # a data set repeats its expressions, and a step is evaluated when read and when checked
def evaluate(expression: str) -> Fraction:
    """The exact value of `expression`.

    Known are `+ - * / //`, signs, parentheses, decimals (`.5`, `7.00`, `1,000`) and per cent (`30%` is 3/10).

    Raises:
        ExpressionError: `expression` is not of that form, divides by zero, or is longer than `MAX_CHARS`.
    """
    return Fraction(_Parser(expression).parse())


def operands_and_operator(expression: str) -> tuple[tuple[str, ...], tuple[Fraction, ...]]:
    """The operators and the operands of `expression`, each in the order of the text; parentheses are left out.

    A sign in front of a number belongs to the number: `3*-5` gives `("*",)` and `(3, -5)`. A sign in front of a
    parenthesis is in neither.

    Raises:
        ExpressionError: as for `evaluate`.
    """
    parser = _Parser(expression)
    parser.parse()
    return tuple(parser.operators), tuple(Fraction(operand) for operand in parser.operands)


# --- steps and problems ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One `<<expression=result>>`, at the characters `start` to `end` (exclusive) of the text that it was read from."""

    expression: str
    result: str
    start: int
    end: int

    @property
    def text(self) -> str:
        """The step as it is written, brackets included."""
        return f"<<{self.expression}={self.result}>>"

    def is_correct(self) -> bool:
        """Whether the expression is exactly the result (`2/3=0.67` is not); False where either has no value."""
        try:
            return evaluate(self.expression) == evaluate(self.result)
        except ExpressionError:
            return False


@dataclass(frozen=True, slots=True)
class Problem:
    """A word problem with its written solution.

    Attributes:
        question: the question.
        steps: the well-formed steps, in the order of the text; their spans index into `rationale`.
        rationale: the written solution with its annotations, without the closing `#### answer`.
        answer: the gold answer without thousands separators, else as written (`1000`, `-5`, `.5`, `7.00`).

    Raises:
        ValueError: a step is not at its span of `rationale`, or the steps overlap or are out of order.
    """

    question: str
    steps: tuple[Step, ...]
    rationale: str
    answer: str

    def __post_init__(self) -> None:
        end = 0
        for step in self.steps:
            if step.start < end or self.rationale[step.start : step.end] != step.text:
                raise ValueError(f"step {step.text!r} is not at characters {step.start} to {step.end} of the rationale")
            end = step.end


# An opening that is never closed ends with its line or at the next opening; a closing without an opening stands alone.
_ANNOTATION = re.compile(r"<<(?!<)(?P<body>(?:(?!<<|>>)[^\n])*)(?P<closed>>>)?|>>")
_RESULT = re.compile(rf"\s*[-+]?{_NUMBER}(?:/{_NUMBER})?%?\s*")


def parse_steps(text: str) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """Finds the `<<expression=result>>` in `text`.

    Well-formed is a step with one `=`, an expression that `evaluate` knows on its left, and a number or a fraction on
    its right; the two need not agree (see `Step.is_correct`). Everything else in or around the brackets is malformed:
    symbols (`<<X/2=0.5X>>`), words, `≈`, a second `=`, no `=`, a bracket without its counterpart.

    Returns:
        The well-formed steps, and the malformed pieces; both in the order of the text, which itself stays as it is.
    """
    steps: list[Step] = []
    malformed: list[str] = []
    for match in _ANNOTATION.finditer(text):
        expression, _, result = (match["body"] or "").partition("=")
        if match["closed"] and _RESULT.fullmatch(result) and _has_value(expression) and _has_value(result):
            steps.append(Step(expression, result, match.start(), match.end()))
        else:
            malformed.append(match[0])
    return tuple(steps), tuple(malformed)


def _has_value(expression: str) -> bool:
    try:
        evaluate(expression)
    except ExpressionError:
        return False
    return True


# --- answers ---------------------------------------------------------------------------------------------------------

ANSWER_MARK = "####"

# In answers commas are taken out wherever they stand between digits, as the field's scoring scripts do.
_LOOSE_NUMBER = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
_MARKED = rf"[ \t]+([-+]?\$?[-+]?{_LOOSE_NUMBER}(?:/[0-9]+)?)"
# A minus belongs to the number unless something to subtract from stands right before it: `5-3` ends in 3, `=-3` in -3.
_ANY = re.compile(rf"(?:(?<![\w.)%$])-\$?|\$-)?{_LOOSE_NUMBER}")
_PLAIN = re.compile(r"([-+]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:/([0-9]+))?")


def split_solution(text: str) -> tuple[str, str]:
    """Splits a written solution at its last `####` into the rationale and the gold answer (commas taken out).

    Raises:
        ValueError: there is no `####`, or nothing behind it.
    """
    rationale, mark, answer = text.rpartition(ANSWER_MARK)
    answer = answer.replace(",", "").strip()
    if not mark:
        raise ValueError(f'no "{ANSWER_MARK}" before the final answer')
    if not answer:
        raise ValueError(f'no answer behind "{ANSWER_MARK}"')
    return rationale.strip(), answer


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is a number, or None.

    `$`, commas, spaces around, a trailing `.` and a trailing `%` are taken off (`25%` as an answer is 25: gold answers
    give percentages as bare numbers). A fraction (`2/5`) is a number. Exponents are not read.
    """
    match = _PLAIN.fullmatch(_bare(text)) if len(text) <= MAX_CHARS else None
    if match is None:
        return None
    sign, number, denominator = match.groups(default="1")
    if int(denominator) == 0:
        return None
    return Fraction(_decimal(number), int(denominator)) * (-1 if sign == "-" else 1)


def _bare(text: str) -> str:
    return text.replace(",", "").replace("$", "").strip().rstrip(" .%")


def strict_answer(output: str, mark: str = ANSWER_MARK) -> str | None:
    """The number of the first `#### number` in `output`, without `$`, commas and a trailing `.`; None if there is none.

    `mark` is what stands before the number in the outputs of models that were trained on another format.

    The rule of GSM8K's own code, `dataset.py` in https://github.com/openai/grade-school-math, but that the numbers are
    then compared as numbers. A fraction counts as one number.
    """
    match = re.search(re.escape(mark) + _MARKED, output)
    return _bare(match[1]) if match else None


def last_number(output: str) -> str | None:
    """The last number in `output`, without `$`, commas and a trailing `.`; None if there is none."""
    matches = _ANY.findall(output)
    return _bare(matches[-1]) if matches else None


def same_number(a: str | None, b: str | None) -> bool:
    """Whether both are numbers and exactly equal (`18`, `18.0` and `$18.` are); a missing number equals nothing."""
    if a is None or b is None:
        return False
    value = parse_number(a)
    return value is not None and value == parse_number(b)
