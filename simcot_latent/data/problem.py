"""A problem, its `<<expression=result>>` steps, and the numbers in them.

Everything is exact: numbers are `fractions.Fraction`, expressions go through a small parser of our own (no `eval`), and
every input is bounded in size, since what is read here may be the output of a half-trained model.

GSM8K's calculator annotations: https://arxiv.org/abs/2110.14168, section 4.1.

**Numbers in answers.** One grammar, for gold answers, for `#### number` (strict) and for the last number of an output:

    number   = sign? amount ("/" amount)? "%"?          7   -7.50   2/5   25% (which is 25, as gold answers have it)
    sign     = "-" | "+", before or behind a currency sign, with a space behind it or none      -5  - 5  -$5  $-5
    amount   = digits ("." digits?)? exponent? | "." digits exponent?                           18.  .5  1.5e3
    digits   may be grouped in thousands by commas; a trailing dot, comma or currency sign is no part of the number
    exponent = "e" sign? digits, or "x10^" digits, also with another sign for times, spaces, braces, raised digits

Before that, format characters (zero-width spaces, byte order marks) are left out, other minus signs are read as "-"
(U+2212, dashes and hyphens too), runs of spaces of any kind as one space, and TeX's `{,}`, `\\,`, `\\$`, `\\%` and
`\\frac{2}{5}` as what they show; an apostrophe, or a narrow or no-break space, between groups of three digits is a
comma, and spaces around a slash are left out. In running text a minus belongs to a number unless something to subtract
from stands right before it (`5-3` ends in 3); with a space behind it, only after `#`, `=`, `:`, `(` or at the
beginning.

What may follow a number, and is left out: words and units, at once or not (`7 apples`, `18cm`, `$5/hour`, TeX's
`\\text{kg}`), and punctuation. In a line of gold it must hold no further number (but for `7 The answer is 7`), and be
nothing to go on calculating with (`5+x`); else the line is no number. What a number goes on to be belongs to it:
`5^2`, `1_000`, `1.2.3`, `1/2/2020`, `12:30`, `0x1F`, `5e5e5`, `10k`, `50%/2`, `3 1/2`, `1 000`, `0.\\overline{3}`, and
commas that group no thousands (`0,5`, `1.000,50`) are no numbers, and equal nothing, not even themselves.
"""

import re
import unicodedata
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
        answer: the gold answer, a number in plain spelling (`1000`, `-5`, `.5`, `7.00`, see `split_solution`).

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

_CURRENCY = r"[$\u20ac\u00a3\u00a5]"
_AMOUNT = r"(?:[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)"
_TIMES = r" ?(?:[x*\u00d7\u00b7\u22c5]|\\times|\\cdot) ?"
_SPACED = r"[0-9]{1,3}(?: [0-9]{3})+(?![0-9])"  # 1 000: a thousand, or 1 and 000
# What would make another number of it, or none.
_MORE = "|".join(
    (
        r"_+[0-9]\w*",  # 1_000
        r"\^\S*|\*\*[0-9]\S*",  # 5^2
        r"%?[/.][0-9][0-9.,/]*",  # 1.2.3  1/2/2020  50%/2
        r"[,:'\u2019][0-9][0-9.,:'\u2019]*",  # 1.000,50  12:30  5'11
        r"[eE][-+]?[0-9]\w*",  # 5e5e5
        r"(?<=\b0)(?:[xX][0-9a-fA-F]|[bBoO][0-9])\w*",  # 0x1F
        r" [0-9]+/[0-9]+",  # 3 1/2
        r" ?[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2150-\u215e]+",  # superscripts, and fractions such as a half
        r"[\u0300-\u036f]+|\([0-9]+\)| ?\\(?:[dt]?frac|overline|bar|dot|over|sqrt|pi)(?![a-zA-Z])\S*",  # 0.\overline{3}
        rf"{_TIMES}10 ?(?:\^|\*\*)\S*",  # 2 x 10^n
        r"[kKMB](?![^\W_])",  # 10k, which is not 10
    )
)
_UNSIGNED = rf"(?:{_SPACED}|{_AMOUNT}{_EXPONENT}?(?:/{_AMOUNT})?)(?:{_MORE})*"
_SIGN = rf"(?:[-+] ?(?:{_CURRENCY} ?)?|{_CURRENCY} ?(?:[-+] ?)?)?"
_MARKED = rf"\s*({_SIGN}{_UNSIGNED})"
_SIGN_IN_TEXT = (
    rf"(?:(?<![\w.)%$])-(?:{_CURRENCY} ?)?|{_CURRENCY} ?-|(?<![\w.)%]){_CURRENCY} ?- "
    rf"|(?:\A|(?<=[#=:(])|(?<=[#=:(] ))- (?:{_CURRENCY} ?)?)?"
)
_ANY = re.compile(_SIGN_IN_TEXT + _UNSIGNED)
_GROUPED = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"  # no comma but of thousands
_WHOLE = re.compile(rf"{_SIGN}(?P<above>{_GROUPED})(?P<exponent>{_EXPONENT})?(?:/(?P<below>{_GROUPED}))?")
MAX_EXPONENT = 999
"""Largest exponent that is read, of either sign."""

_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-")


def _exponent(power: re.Match[str]) -> str:
    return "e" + (power[1] or power[2] or power[3]).translate(_RAISED)


_SPELLINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"[\u2010-\u2013\u2212\ufe63\uff0d]"), "-"),
    (re.compile(r"(?<=[0-9])['\u2019\u00a0\u2007-\u2009\u202f](?=[0-9]{3}(?![0-9]))|\{,\}|\\,"), ","),
    (re.compile(r"[\u2044\u2215]"), "/"),
    (re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]+"), " "),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile(r"(?<=[0-9])(?=\\[dt]?frac\{)"), " "),
    (re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"), r"\1/\2"),
    (re.compile(r"(?<=[0-9.%]) ?/ ?(?=\.?[0-9])"), "/"),
    (
        re.compile(
            rf"(?<=[0-9.]){_TIMES}10(?: ?(?:\^|\*\*) ?(?:\{{ ?([-+]?[0-9]+) ?\}}|([-+]?[0-9]+))"
            r"|([\u207a\u207b]?[\u00b9\u00b2\u00b3\u2070\u2074-\u2079]+))"
        ),
        _exponent,
    ),
)


def _visible(text: str) -> str:
    """A text without its format characters (Unicode's Cf: zero-width spaces, byte order marks and the like)."""
    return text if text.isascii() else "".join(char for char in text if unicodedata.category(char) != "Cf")


def _plain(text: str) -> str:
    """A text whose numbers are spelled in one way, see the top of the module."""
    text = _visible(text)
    for spelling, plain in _SPELLINGS:
        text = spelling.sub(plain, text)
    return text


def _bare(number: str) -> str:
    """A number without commas, currency signs and spaces, and without a trailing `.` or `%`; what is none, as it is."""
    if parse_number(number) is None:
        return number
    return re.sub(rf"{_CURRENCY}|[, ]", "", number).rstrip(".%")


def split_solution(text: str) -> tuple[str, str]:
    """Splits a written solution at its last `####` into the rationale and the gold answer.

    The answer is the first line behind the mark: of a number its plain spelling without commas (a `$` or `%` stays),
    without the unit or words that follow it (`7 apples`, `18cm`, but not `7 or 8`); any other text as it is. What else
    is there is left out, see `trailer`.

    Raises:
        ValueError: there is no `####`, or nothing behind it.
    """
    rationale, mark, rest = text.rpartition(ANSWER_MARK)
    if not mark:
        raise ValueError(f'no "{ANSWER_MARK}" before the final answer')
    if not _visible(rest).strip():
        raise ValueError(f'no answer behind "{ANSWER_MARK}"')
    return rationale.strip(), _split_answer(rest)[0]


def trailer(text: str) -> str:
    """What a written solution has behind its gold answer, and `split_solution` leaves out; mostly nothing."""
    return _split_answer(text.rpartition(ANSWER_MARK)[2])[1]


_GOLD = re.compile(
    rf"(?P<number>{_SIGN}{_AMOUNT}{_EXPONENT}?(?:/{_AMOUNT})?(?: ?%)?(?:{_CURRENCY}|\.)?)"
    # A unit, words or punctuation, but nothing to go on calculating with: 18cm  $5/hour  7!  not 5+x.
    r"(?P<rest>(?: *(?:/ *[^\W\d_]|[^-+*/^=<>_~\u2248\s]).*)?)"
)


def _split_answer(text: str) -> tuple[str, str]:
    """The answer that a text begins with, and what else is there."""
    line, others = "", text.strip()
    while others and not _visible(line).strip():
        line, _, others = others.partition("\n")
    line = line.strip()
    match = _GOLD.fullmatch(_plain(line))
    if match is None:
        return line, others.strip()
    number, rest = match["number"], match["rest"]
    again = last_number(rest)
    value = parse_number(number)
    if (
        # As both readings of an output read the line, and nothing else in it is a number (but for `7 The answer is 7`).
        value is None
        or any(parse_number(found or "") != value for found in (strict_answer(ANSWER_MARK + line), last_number(line)))
        or not (again is None or (re.match(r" +[^\W\d_]", rest) and parse_number(again) == value))
    ):
        return line, others.strip()
    return re.sub(r"(?<=[-+]) |,", "", number), f"{rest}\n{others}".strip()


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is a number, or None. See the top of the module for what a number is."""
    if len(text) > MAX_CHARS:
        return None
    match = _WHOLE.fullmatch(re.sub(rf"(?:{_CURRENCY}|[ .,%])+\Z", "", _plain(text).strip()))
    if match is None:
        return None
    value, below = Fraction(_decimal(match["above"])), _decimal(match["below"] or "1")
    exponent = (match["exponent"] or "e0")[1:]
    if below == 0 or len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    negative = "-" in match[0][: match.start("above")]
    return value * Fraction(10) ** int(exponent) / below * (-1 if negative else 1)


def strict_answer(output: str, mark: str = ANSWER_MARK) -> str | None:
    """The number of the first `#### number` in `output`, without `$`, commas and a trailing `.`; None if there is none.

    Between mark and number there may be spaces, or nothing. `mark` is what stands before the number in the outputs of
    models that were trained on another format.

    The rule of GSM8K's own code, `dataset.py` in https://github.com/openai/grade-school-math, but that the numbers are
    then compared as numbers.
    """
    match = re.search(re.escape(_plain(mark)) + _MARKED, _plain(output))
    return _bare(match[1]) if match else None


def last_number(output: str) -> str | None:
    """The last number in `output`, without `$`, commas and a trailing `.`; None if there is none."""
    matches = _ANY.findall(_plain(output))
    return _bare(matches[-1]) if matches else None


def same_number(a: str | None, gold: str | None, tolerance: float = 0.0) -> bool:
    """Whether both are numbers and equal (`18`, `18.0` and `$18.` are); a missing number equals nothing.

    Args:
        tolerance: how far `a` may be from `gold`, as a share of `gold`; 0: not at all.
    """
    if a is None or gold is None:
        return False
    value, wanted = parse_number(a), parse_number(gold)
    if value is None or wanted is None:
        return False
    return abs(value - wanted) <= Fraction(str(tolerance)) * abs(wanted)  # the decimal as it was given
