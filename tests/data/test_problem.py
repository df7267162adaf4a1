"""Steps, expressions and answers: the quirks of the real data one by one, and properties over made-up ones."""

import ast
import operator
import re
import time
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simcot_latent.data.problem import (
    ANSWER_MARK,
    MAX_CHARS,
    MAX_DEPTH,
    ExpressionError,
    Problem,
    Step,
    evaluate,
    last_number,
    operands_and_operator,
    parse_number,
    parse_steps,
    same_number,
    split_solution,
    strict_answer,
    trailer,
)

no_deadline = settings(deadline=None)  # a busy machine may take its time over an example

# --- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", 24),
        ("2+3*4-5", 9),
        ("(2+3)*4", 20),
        ("10-3-2", 5),
        ("16/4/2", 2),
        ("7//2", 3),
        ("-7//2", -4),
        ("1/3+1/3+1/3", 1),  # exactly: in floats it is not
        ("0.1+0.2", Fraction(3, 10)),
        (".5", Fraction(1, 2)),
        ("7.00", 7),
        ("7.", 7),
        ("+5", 5),
        ("+16-10", 6),
        ("-14+-8+1", -21),
        ("3*+6", 18),
        ("--5", 5),
        ("-(3-5)", 2),
        ("1,000*2", 2000),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("30%*50", 15),
        ("(10+20)%", Fraction(3, 10)),
        (" 5 * ( 2 + 1 ) ", 15),
        ("12", 12),
        ("007", 7),
    ],
)
def test_evaluate(expression: str, value: Fraction | int) -> None:
    assert evaluate(expression) == value
    assert isinstance(evaluate(expression), Fraction)


@pytest.mark.parametrize(
    "expression",
    ["", " ", "+", "()", "(1", "1)", "1+", "*2", "1 2", "1..2", "1.2.3", ".", ",5", "1,00", "1,0000", "2^3", "2**3"]
    + ["x", "0.5X", "3x4", "sqrt(147)", "~9.29", "5=5", "1/0", "1//0", "1/(2-2)", "2(3)", "7%3", "1e5", "$5", "٣", "5²"]
    + ["__import__('os')", "1_000", "0x10", "1+\0"],
)
def test_evaluate_refuses(expression: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(expression)
    with pytest.raises(ExpressionError):
        operands_and_operator(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 100_000,
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "1" * (MAX_CHARS + 1),
        "-" * 100_000 + "1",
        "9" * 100_000 + "*" + "9" * 100_000,
    ],
)
def test_evaluate_is_bounded(expression: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ExpressionError):
        evaluate(expression)
    assert time.perf_counter() - start < 5


def test_evaluate_at_the_bounds() -> None:
    start = time.perf_counter()
    assert evaluate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == 1
    assert evaluate("-" * (MAX_CHARS - 1) + "1") == (-1) ** (MAX_CHARS - 1)
    assert evaluate("9" * MAX_CHARS) == 10**MAX_CHARS - 1
    assert evaluate("+".join(["1/7"] * 250)) == Fraction(250, 7)
    assert time.perf_counter() - start < 5


@st.composite
def chains(draw: st.DrawFn) -> str:
    """An expression in Python's own grammar, without powers."""
    depth = draw(st.integers(0, 3))

    def chain(depth: int) -> str:
        parts = draw(st.lists(st.just(None), min_size=1, max_size=4))
        pieces = [draw(st.sampled_from(["", "", "-", "+"])) + atom(depth) for _ in parts]
        text = pieces[0]
        for piece in pieces[1:]:
            text += draw(st.sampled_from(["+", "-", "*", "/", "//"])) + piece
        return text

    def atom(depth: int) -> str:
        if depth and draw(st.booleans()):
            return f"({chain(depth - 1)})"
        return draw(st.sampled_from(["{}", "{}.", "{}.0", "{}.25", ".{}"])).format(draw(st.integers(0, 99)))

    return chain(depth)


OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def exact(node: ast.expr) -> Fraction:
    """The value of what Python has parsed, in fractions throughout: `//` of Python gives whole numbers, whose `/` is no
    fraction any more.
    """
    if isinstance(node, ast.BinOp):
        return Fraction(OPERATIONS[type(node.op)](exact(node.left), exact(node.right)))
    if isinstance(node, ast.UnaryOp):
        return -exact(node.operand) if isinstance(node.op, ast.USub) else exact(node.operand)
    assert isinstance(node, ast.Constant)
    return Fraction(str(node.value))


@no_deadline
@given(chains())
@example("(0//1)/(3//1)")
def test_evaluate_agrees_with_pythons_parser(expression: str) -> None:
    # In quotes, as they are written: no number becomes a float.
    quoted = re.sub(r"[0-9]*\.[0-9]+|[0-9]+\.?", lambda number: f"'{number[0].rstrip('.')}'", expression)
    try:
        value = exact(ast.parse(quoted, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            evaluate(expression)
    else:
        assert evaluate(expression) == value


@no_deadline
@given(st.text(alphabet="0123456789.,+-*/()% =x", max_size=40) | st.text(max_size=20))
def test_evaluate_gives_a_value_or_an_expression_error(text: str) -> None:
    try:
        assert isinstance(evaluate(text), Fraction)
    except ExpressionError:
        pass


@pytest.mark.parametrize(
    ("expression", "operators", "operands"),
    [
        ("48/2", "/", [48, 2]),
        ("16-3-4", "--", [16, 3, 4]),
        ("3*-5", "*", [3, -5]),
        ("-14+-8+1", "++", [-14, -8, 1]),
        ("2*(3+.5)", "*+", [2, 3, Fraction(1, 2)]),
        ("(1+2)*(3-4)", "+*-", [1, 2, 3, 4]),
        ("-(3+4)", "+", [3, 4]),
        ("30%*1,000", "*", [Fraction(3, 10), 1000]),
        ("12", "", [12]),
    ],
)
def test_operands_and_operator(expression: str, operators: str, operands: list[Fraction | int]) -> None:
    assert operands_and_operator(expression) == (tuple(operators), tuple(operands))


def test_floor_division_is_one_operator() -> None:
    assert operands_and_operator("7//2") == (("//",), (7, 2))


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "result", "is_correct"),
    [
        ("48/2", "24", True),
        ("12", "12", True),  # GSM8K: a bare <<12=12>>
        ("3/4", "3/4", True),  # GSM8K, test 320
        ("1/4+1/3", "7/12", True),
        (".5*2", "1.00", True),
        ("3.5*2", "7.00", True),
        ("1/2", ".5", True),
        ("+2+3", "5", True),
        ("7//2", "3", True),
        ("5-8", "-3", True),
        ("1000*2", "2,000", True),
        ("5 * 3 ", " 15", True),
        ("3/4", "75%", True),
        ("40/3", "13.33", False),  # GSM8K-Aug: rounded
        ("20-4-12-8", "0", False),  # GSM8K-Aug: wrong
    ],
)
def test_well_formed_steps(expression: str, result: str, is_correct: bool) -> None:
    text = f"so <<{expression}={result}>>{result} of them"
    steps, malformed = parse_steps(text)
    assert malformed == ()
    [step] = steps
    assert (step.expression, step.result) == (expression, result)
    assert text[step.start : step.end] == step.text == f"<<{expression}={result}>>"
    assert step.is_correct() is is_correct


@pytest.mark.parametrize(
    "piece",
    [
        # from GSM8K-Aug
        "<<x=5>>",
        "<<X/2=0.5X>>",
        "<<3*X=3X>>",
        "<<1500/19=78.94736842105263≈79>>",
        "<<4000*3/7=1714.2857142857142~1714>>",
        "<<260/28=~9.29>>",
        "<<35*1/3=11.67=11.67>>",
        "<<25*(30/100)=7.5=7.5(roundedtonearestinteger=7)>>",
        "<<2/3*3.14159*2^3=16.755>>",
        "<<sqrt(147)=12.1243>>",
        # made up
        "<<>>",
        "<<=>>",
        "<<5>>",
        "<<5+3>>",
        "<<5+3=>>",
        "<<=8>>",
        "<<5/0=0>>",
        "<<1=1/0>>",
        "<<5+3=4+4>>",
        "<<5+3=(8)>>",
        "<<two+3=5>>",
        "<<5+3=8 apples>>",
        "<<5+3=8>",
        "<<5+3=8",
        "5+3=8>>",
        "<<",
        ">>",
        "<<" + "(" * 5000 + "=1>>",
        "<<" + "9" * 5000 + "=1>>",
    ],
)
def test_malformed_steps_stay_text_and_are_told(piece: str) -> None:
    steps, malformed = parse_steps(f"first <<1+1=2>>2\n{piece}\nthen <<2+2=4>>4")
    assert [step.text for step in steps] == ["<<1+1=2>>", "<<2+2=4>>"]
    assert malformed == (piece if "<<" in piece else ">>",)


@pytest.mark.parametrize(
    ("text", "steps", "malformed"),
    [
        ("", [], []),
        ("no step, but 3 < 4 and 5 > 4", [], []),
        ("<<1+1=2>><<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"], []),
        ("<<1+1=2 and <<2+2=4>>", ["<<2+2=4>>"], ["<<1+1=2 and "]),
        ("<<1+<<1+1=2>>=3>>", ["<<1+1=2>>"], ["<<1+", ">>"]),
        ("<<<1+1=2>>>", ["<<1+1=2>>"], []),
        ("<<1+\n1=2>>", [], ["<<1+", ">>"]),
        ("a\u2028<<1+1=2>>\U0001f600<<2+2=4>>", ["<<1+1=2>>", "<<2+2=4>>"], []),
    ],
)
def test_steps_in_running_text(text: str, steps: list[str], malformed: list[str]) -> None:
    found, left = parse_steps(text)
    assert [step.text for step in found] == [text[step.start : step.end] for step in found] == steps
    assert list(left) == malformed


numbers = st.integers(-(10**6), 10**6).map(str) | st.sampled_from([".5", "7.00", "-0.25", "1,000", "+3", "3/4", "20%"])
plain_text = st.text(st.characters(exclude_characters="<>"), max_size=20)
steps_as_written = st.builds(lambda expression, result: f"<<{expression}={result}>>", chains(), numbers)


@no_deadline
@given(st.lists(st.tuples(plain_text, steps_as_written)), plain_text)
def test_steps_round_trip(pieces: list[tuple[str, str]], tail: str) -> None:
    text = "".join(before + step for before, step in pieces) + tail
    steps, malformed = parse_steps(text)
    assert [text[step.start : step.end] for step in steps] == [step.text for step in steps]
    # what divides by zero is no step; the rest is all found, in order, with nothing between lost
    assert sorted([*(step.text for step in steps), *malformed]) == sorted(step for _, step in pieces)
    rebuilt, position = "", 0
    for step in steps:
        rebuilt += text[position : step.start] + step.text
        position = step.end
    assert rebuilt + text[position:] == text
    Problem("q", steps, text, "1")  # raises where a span is off


@no_deadline
@given(st.text(alphabet="<>=0123456789+-*/(). \n≈xX", max_size=60) | st.text(max_size=60))
def test_any_text_can_be_parsed(text: str) -> None:
    steps, malformed = parse_steps(text)
    Problem("q", steps, text, "1")
    for piece in malformed:
        assert piece in text
    for step in steps:
        assert step.is_correct() in (True, False)
        assert parse_steps(step.text) == ((Step(step.expression, step.result, 0, len(step.text)),), ())


def test_parsing_hostile_text_is_linear() -> None:
    start = time.perf_counter()
    for piece in ["<", "<<", ">", ">>", "<<1", "<<(", "<<1=", "= <<"]:
        parse_steps(piece * 20_000)
    assert time.perf_counter() - start < 5


def test_is_correct_of_a_step_that_cannot_be_evaluated() -> None:
    assert not Step("x", "5", 0, 7).is_correct()
    assert not Step("5/0", "5", 0, 9).is_correct()
    assert not Step("5", "x", 0, 7).is_correct()


def test_a_problem_checks_its_spans() -> None:
    text = "<<1+1=2>> <<2+2=4>>"
    steps, _ = parse_steps(text)
    assert Problem("q", steps, text, "4").steps == steps
    for wrong in [(steps[0], steps[0]), steps[::-1], (Step("1+1", "2", 1, 10),), (Step("1+1", "3", 0, 9),)]:
        with pytest.raises(ValueError, match="is not at characters"):
            Problem("q", wrong, text, "4")


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ("a <<1+1=2>>2\n#### 2", "a <<1+1=2>>2", "2"),
        ("x\n#### 1,450,000", "x", "1450000"),
        ("x\n#### -5", "x", "-5"),
        ("x #### .45 ", "x", ".45"),
        ("x #### 7.00", "x", "7.00"),
        ("x #### 2/5", "x", "2/5"),
        ("#### 3", "", "3"),
        ("x ####3", "x", "3"),
        ("x #### 1 #### 2", "x #### 1", "2"),
        # Further lines and words are no part of the answer, a number is spelled plainly.
        ("x\n#### 7\nThe answer is: 7", "x", "7"),
        ("x\n#### 7\r\n\r\nThe answer is: 7\n", "x", "7"),
        ("x\n####\n7\nThe answer is: 8", "x", "7"),
        ("x\n#### 7 The answer is: 7", "x", "7"),
        ("x\n#### 7 apples", "x", "7"),
        ("x\n#### $7.50 for all", "x", "$7.50"),
        ("x\n#### 30% of them", "x", "30%"),
        ("x\n#### 9{,}500", "x", "9500"),
        ("x\n####\u00a09\u00a0500", "x", "9500"),
        ("x\n#### \u22125", "x", "-5"),
        ("x\n#### - 5", "x", "-5"),
        ("x\n#### 1.5e17", "x", "1.5e17"),
        ("x\n#### 18cm", "x", "18"),
        ("x\n#### 18cm.", "x", "18"),
        ("x\n####18cm", "x", "18"),
        ("x\n#### 5 \\text{apples}", "x", "5"),
        ("x\n#### 5\\text{ apples}", "x", "5"),
        ("x\n#### 2/5\\ \\mathrm{kg}", "x", "2/5"),
        ("x\n#### 18 (eighteen)", "x", "18"),
        ("x\n#### $5/hour", "x", "$5"),
        ("x\n#### 7!", "x", "7"),
        ("x\n#### 7, in all", "x", "7"),
        ("x\n#### 90\u00b0", "x", "90"),
        ("x\n#### 3pm", "x", "3"),
        # Not one number: kept whole, and told as no number.
        ("x\n#### 10k", "x", "10k"),
        ("x\n#### 5+x", "x", "5+x"),
        ("x\n#### 5+5", "x", "5+5"),
        ("x\n#### 5 = 5", "x", "5 = 5"),
        ("x\n#### 5x5", "x", "5x5"),
        ("x\n#### 18cm^2", "x", "18cm^2"),
        ("x\n#### 18-20", "x", "18-20"),
        ("x\n#### 5 \\text{to} 6", "x", "5 \\text{to} 6"),
        ("x\n#### 7 or 8", "x", "7 or 8"),
        ("x\n#### 12:30", "x", "12:30"),
        ("x\n#### 3 1/2", "x", "3 1/2"),
        ("x\n#### Tom is a lempus, not a wumpus", "x", "Tom is a lempus, not a wumpus"),
    ],
)
def test_split_solution(text: str, rationale: str, answer: str) -> None:
    assert split_solution(text) == (rationale, answer)


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("x\n#### 7", ""),
        ("x\n#### 1,000.\n", ""),
        ("x\n#### no number", ""),
        ("x\n#### 7\nThe answer is: 7", "The answer is: 7"),
        ("x\n#### 7 apples\nof his", "apples\nof his"),
        ("x\n#### 18cm", "cm"),
        ("x\n#### 5 \\text{apples}", "\\text{apples}"),
    ],
)
def test_what_is_left_out_behind_an_answer(text: str, left_out: str) -> None:
    assert trailer(text) == left_out


@pytest.mark.parametrize(("text", "message"), [("x 5", 'no "####"'), ("", 'no "####"'), ("x ####", "no answer")])
def test_split_solution_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_solution(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("18.0", 18),
        ("18.", 18),
        ("$18", 18),
        ("-$18", -18),
        ("$-18", -18),
        ("+3", 3),
        (" 1,450,000 ", 1450000),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("7.00", 7),
        ("2/5", Fraction(2, 5)),
        ("25%", 25),
        ("25 %.", 25),
        ("1/0", None),
        ("", None),
        (".", None),
        ("-", None),
        ("$", None),
        ("18 apples", None),
        ("1 2", None),
        ("1.2.3", None),
        ("--1", None),
        ("nan", None),
        ("inf", None),
        ("1e5", 100_000),
        ("1.5e3", 1500),
        ("1.5E+3", 1500),
        ("-15e-1", Fraction(-3, 2)),
        ("1.5e17", 150_000_000_000_000_000),
        ("1.5x10^3", 1500),
        ("1.5 \u00d7 10^{3}", 1500),
        ("1.5 \\times 10^3", 1500),
        ("1e999", 10**999),
        ("1e1000", None),
        ("1e-99999999999", None),
        ("9{,}500", 9500),
        ("9\\,500", 9500),
        ("9\u00a0500", 9500),
        ("9\u202f500.5", Fraction(19001, 2)),
        ("9\u00a050", None),
        ("\u22125", -5),
        ("\u20135", -5),
        ("- 5", -5),
        ("$ 5", 5),
        ("- $ 5", -5),
        ("\u20ac5", 5),
        ("5$", 5),
        ("\\$5", 5),
        ("25\\%", 25),
        ("\\frac{2}{5}", Fraction(2, 5)),
        ("-1/2", Fraction(-1, 2)),
        ("10/2.5", 4),
        ("1/2/3", None),
        ("2\u20445", Fraction(2, 5)),
        ("2\u00bd", None),
        ("5\u00b2", None),
        ("5^2", None),
        ("1_000", None),
        ("٣", None),
        ("9" * 100_000, None),
    ],
)
def test_parse_number(text: str, value: Fraction | int | None) -> None:
    assert parse_number(text) == value


@no_deadline
@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
def test_numbers_round_trip(scaled: int, decimals: int) -> None:
    value = Fraction(scaled, 10**decimals)
    for text in (f"{scaled / 10**decimals:.{decimals}f}", f"{int(value):,}" if value.denominator == 1 else str(value)):
        assert parse_number(text) == value
        assert same_number(text, f"${text}" if scaled >= 0 else text)
        assert parse_number(strict_answer(f"so\n#### {text}\n") or "") == value


@pytest.mark.parametrize(
    ("output", "strict", "last"),
    [
        ("She has <<9*2=18>>18 dollars.\n#### 18", "18", "18"),
        ("#### $1,450,000.", "1450000", "1450000"),
        ("#### -5", "-5", "-5"),
        ("#### -$5", "-5", "-5"),
        ("#### .5", ".5", ".5"),
        ("#### 18.0 eggs", "18.0", "18.0"),
        ("#### 2/5", "2/5", "2/5"),
        ("#### 1.5e3", "1.5e3", "1.5e3"),
        ("#### 1.5 x 10^3", "1.5e3", "1.5e3"),
        ("#### 9{,}500", "9500", "9500"),
        ("#### 9\u00a0500", "9500", "9500"),
        ("####\u00a05", "5", "5"),
        ("#### - 5", "-5", "-5"),
        ("#### \u22125", "-5", "-5"),
        ("#### $ 5", "5", "5"),
        ("#### $- 5", "-5", "-5"),
        ("It costs 8$ - 5$", None, "5"),
        ("#### \u20ac5", "5", "5"),
        ("#### 5\u00b2", "5\u00b2", "5\u00b2"),
        ("#### 1_000", "1_000", "1_000"),
        ("#### 1.2.3", "1.2.3", "1.2.3"),
        ("#### _18_", None, "18"),
        ("#### 18cm", "18", "18"),
        ("The answer is 3 - 5", None, "5"),
        ("Answer:\n- 5 apples", None, "5"),
        ("Answer: - 5", None, "-5"),
        ("x = - 5", None, "-5"),
        ("12/4=3", None, "3"),
        ("on 1/2/2020", None, "1/2/2020"),
        ("3\u20135 apples", None, "5"),
        ("#### 18\n#### 19", "18", "19"),
        ("#### none, #### 7", "7", "7"),
        ("####", None, None),
        ("#### \n18", "18", "18"),
        ("####18", "18", "18"),
        ("####$1,000.", "1000", "1000"),
        ("####-5", "-5", "-5"),
        ("####- 5", "-5", "-5"),
        ("#####18", "18", "18"),
        ("#### 10k", "10k", "10k"),
        ("#### 5M dollars", "5M", "5M"),
        ("#### 5 M", "5", "5"),
        ("#### 10km", "10", "10"),
        ("#### eighteen", None, None),
        ("The answer is 18.", None, "18"),
        ("It is 3 - 5 = -2", None, "-2"),
        ("It is 5-3", None, "3"),
        ("<<3-5=-2>>-2 left", None, "-2"),
        ("costs $-4.50.", None, "-4.50"),
        ("25%", None, "25"),
        ("one, 2, 3, go", None, "3"),
        ("COVID-19", None, "19"),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_the_two_rules(output: str, strict: str | None, last: str | None) -> None:
    assert strict_answer(output) == strict
    assert last_number(output) == last


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("18", "18.0", True),
        ("18", "18.", True),
        ("1,000", "$1000", True),
        ("2/5", "0.4", True),
        ("-0", "0", True),
        ("18", "-18", False),
        ("18", "18.0000001", False),
        ("1000000000000000000000001", "1000000000000000000000000", False),  # equal as floats
        (None, None, False),
        ("x", "x", False),
        ("", "", False),
        (None, "18", False),
        ("18", None, False),
        ("x", "18", False),
        ("18", "x", False),
    ],
)
def test_same_number(a: str | None, b: str | None, same: bool) -> None:
    assert same_number(a, b) is same


@pytest.mark.parametrize(
    ("a", "gold", "tolerance", "same"),
    [
        ("0.666667", "0.6666666667", 0.0, False),
        ("0.666667", "0.6666666667", 1e-6, True),
        ("0.66", "0.6666666667", 1e-6, False),
        ("2/3", "0.6666666667", 1e-6, True),
        ("-0.666667", "0.6666666667", 1e-6, False),
        ("101", "100", 0.01, True),  # of gold, not of the answer
        ("100", "101", 0.0099, False),
        ("14", "20", 0.3, True),  # as decimals: the nearest float to 0.3 is less
        ("-101", "-100", 0.01, True),
        ("0.000001", "0", 0.5, False),  # there is no share of 0
        ("0", "0", 0.0, True),
        (None, "1", 1.0, False),
        ("x", "1", 1.0, False),
    ],
)
def test_a_tolerance_is_a_share_of_gold(a: str | None, gold: str, tolerance: float, same: bool) -> None:
    assert same_number(a, gold, tolerance) is same


def test_the_beginning_of_a_number_is_not_that_number() -> None:
    """Right by the number before the exponent, the power, the fraction: wrong."""
    for output, gold in [
        ("#### 1.5e3", "1.5"),
        ("#### 1.5 x 10^3", "1.5"),
        ("#### 5^2", "5"),
        ("#### 1_000", "1"),
        ("#### 2\u00bd", "2"),
        ("#### 1.2.3", "1.2"),
        ("#### 10/2.5", "10"),
        ("#### 9\u00a0500", "9"),
    ]:
        assert not same_number(strict_answer(output), gold), output
        assert not same_number(last_number(output), gold), output


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 / 5", Fraction(2, 5)),
        ("2\u00a0/\u00a05", Fraction(2, 5)),
        ("7 \u00b7 10^2", 700),
        ("7 \u00d7 10\u00b2", 700),
        ("5 * 10\u207b\u00b2", Fraction(1, 20)),
        ("2 \\cdot 10^{3}", 2000),
        ("2 x10^{ 3 }", 2000),
        ("2*10**3", 2000),
        ("1'000", 1000),
        ("1\u2019000", 1000),
        ("\u20105", -5),
        ("\u20125", -5),
        ("\n7", 7),
        ("\ufeff\n7", 7),
        ("\ufeff7", 7),
        ("7\u200b", 7),
        ("\u20667\u2069", 7),
        ("1,000,", 1000),
        *((text, None) for text in ("1 000", "0x1F", "12:30", "5e5e5", "1__0", "0.\\overline{3}", "0.(3)", "50%/2")),
        *((text, None) for text in ("3 \u00bd", "3 1/2", "1\\frac{1}{2}", "1\\frac12", "2 x 10^n", "5'11", "0b11")),
        *((text, None) for text in ("1.000,50", "2.500,00", "0,5", "1,5", "0,500", "1,0000", "1,2,3", "1_000^2")),
    ],
)
def test_every_reading_takes_the_whole_number_or_none(text: str, value: Fraction | int | None) -> None:
    solution = f"so\n#### {text}"
    gold = split_solution(solution)[1]
    assert parse_number(gold) == value
    assert gold == text or value is not None  # what is no number stays as it is written
    for read in (strict_answer(solution), last_number(solution)):
        assert parse_number(read or "") == value, read
        assert same_number(read, gold) is (value is not None)


@st.composite
def spelled_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number as somebody may write it, and its value."""
    whole, decimals = draw(st.integers(0, 10**7)), draw(st.integers(0, 3))
    digits = draw(st.sampled_from(["{}", "{:,}"])).format(whole)
    digits = digits.replace(",", draw(st.sampled_from([",", "{,}", "\\,", "\u00a0", "\u202f"])))
    value = Fraction(whole)
    kind = draw(st.sampled_from(["plain", "dot", "exponent", "power", "fraction"]))
    if kind == "dot":
        digits += "."
    elif kind != "fraction" and decimals:
        tail = draw(st.integers(0, 10**decimals - 1))
        digits, value = f"{digits}.{tail:0{decimals}d}", value + Fraction(tail, 10**decimals)
    if kind == "exponent":
        exponent = draw(st.integers(-20, 20))
        digits, value = digits + draw(st.sampled_from("eE")) + str(exponent), value * Fraction(10) ** exponent
    elif kind == "power":
        exponent = draw(st.integers(-20, 20))
        power = draw(st.sampled_from([" x 10^{}", "*10^{{{}}}", "\u00d710^{}", " \\times 10^{}"]))
        digits, value = digits + power.format(exponent), value * Fraction(10) ** exponent
    elif kind == "fraction":
        below, slash = draw(st.integers(1, 999)), draw(st.sampled_from("/\u2044"))
        digits, value = f"{digits}{slash}{below}", value / below
    minus = draw(st.sampled_from(["-", "\u2212", "- ", "-$", "$-", "\u2212 $ ", "-\u20ac", "\u2013"]))
    plus = draw(st.sampled_from(["", "", "", "$", "$ ", "\\$", "+", "\u00a3"]))
    negative = draw(st.booleans())
    end = draw(st.sampled_from(["", ".", "%", " %", "\\%", " %.", "$"]))
    return (minus if negative else plus) + digits + end, -value if negative else value


@no_deadline
@given(
    spelled_numbers(),
    st.sampled_from(["", " ", "  ", "\t", "\u00a0"]),
    st.sampled_from(
        ["", " apples", " in all.", "cm", "kg.", " \\text{apples}", "\\text{ m}", "/hour", " (in all)", "!"]
    ),
)
def test_all_readings_of_a_single_number_agree(number: tuple[str, Fraction], space: str, words: str) -> None:
    """Strict, last number, gold, and the number by itself: one grammar."""
    text, value = number
    output = f"She counts them.\n####{space}{text}{words}"
    assert parse_number(text) == value
    for read in (strict_answer(output), last_number(output), split_solution(output)[1]):
        assert read is not None
        assert parse_number(read) == value, read
        assert same_number(read, text)
    assert not same_number(strict_answer(output), str(value + 1))


@no_deadline
@given(st.text() | st.text(alphabet="#0123456789.,$-+/% \n") | st.text(alphabet="# 12e^_/.x*{}-\u2212\u00a0\u00bd"))
def test_any_output_can_be_scored(output: str) -> None:
    """Read again, what was found is the same; it is no number only where it goes on to be something else."""
    for number in (strict_answer(output), last_number(output)):
        if number is not None:
            assert strict_answer(f"#### {number}") == number
            assert parse_number(number) is not None or not re.fullmatch(r"[-+$ ]*[0-9]+(\.[0-9]+)?", number)
    if ANSWER_MARK in output and output.rpartition(ANSWER_MARK)[2].strip():
        answer = split_solution(output)[1]
        if parse_number(answer) is not None:
            assert same_number(strict_answer(f"#### {answer}"), answer)


@no_deadline
@given(
    spelled_numbers() | st.tuples(st.text(alphabet="0123456789.,-$ ", max_size=5), st.none()),
    st.text(max_size=4) | st.text(alphabet="cmkgxK²°%!/()\\{}^_-+*=. e1", max_size=6),
)
def test_gold_is_a_number_only_as_both_readings_of_an_output_read_it(
    number: tuple[str, Fraction | None], behind: str
) -> None:
    """A line that is gold's, and the same line as an output: all three are one number, or gold is none."""
    line = f"{number[0]}{behind}".partition("\n")[0]
    try:
        gold = split_solution(f"#### {line}")[1]
    except ValueError:  # nothing that can be seen
        return
    if parse_number(gold) is not None and ANSWER_MARK not in line:
        for space in ("", " "):
            assert same_number(strict_answer(f"so\n####{space}{line}\n"), gold)
        assert same_number(last_number(line), gold)


def test_scoring_hostile_text_is_linear() -> None:
    start = time.process_time()
    for piece in [
        "#### ",
        "-",
        "$",
        "1,",
        "9",
        "####",
        "1.",
        "-$",
        "1/",
        "- ",
        "$ -",
        "1e",
        "1_",
        "^",
        "1 x 10",
        "{,}",
        "\\",
        "1 000 ",
        "1 1",
        ",5",
        "1.5,",
        "1:",
        "1(",
        "\u200b",
        "\n",
    ]:
        output = "#### 1 " + piece * 50_000
        split_solution(f"{output}#### 1{piece * 50_000} 1")
        strict_answer(output)
        last_number(output)
        same_number(output, output)
    assert time.process_time() - start < 5
