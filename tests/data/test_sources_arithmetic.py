"""The generated word problems: what they promise, checked from their text, without the generator's own bookkeeping."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from simcot_latent.data.problem import Problem, operands_and_operator, parse_steps
from simcot_latent.data.sources import LoadedSplit, Split
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.word_problems.situations import SITUATIONS
from simcot_latent.errors import UserError

pytestmark = pytest.mark.xdist_group("arithmetic")  # one worker, so that the default data are made once

CONFIG = Path(__file__).parents[2] / "configs" / "data" / "arithmetic.yaml"

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# The data are part of every published figure: a change of a digest is a change of the benchmark. Checkpoints from
# before there were versions go on evaluating on version 1.
DIGESTS = {
    1: {"train": "9037433d40645054", "validation": "d3b70c632bea0d1b", "test": "befe32b9feb3fac4"},
    2: {"train": "cc536b3977b42174", "validation": "138170fc0608be60", "test": "63a85d624b27da72"},
}
# Settings far from the default, for version 1: as it was made before there were versions.
OTHERS = {"seed": 3, "min_steps": 1, "max_steps": 5, "max_number": 30, "max_factor": 6, "max_result": 200,
          "branching": 0.2, "distractors": 0.5}  # fmt: skip
DIGESTS_OF_OTHERS = {"train": "c47e8a8ca04a2985", "validation": "d9daa8daa0583ea3", "test": "55def340c6fb97e3"}


@pytest.fixture(scope="module")
def loaded() -> dict[str, LoadedSplit]:
    """The default data, in full, as `data=arithmetic` has them."""
    source = Arithmetic(version=2)
    return {split: source.load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def splits(loaded: dict[str, LoadedSplit]) -> dict[str, list[Problem]]:
    return {split: list(loaded[split].problems) for split in SPLITS}


@pytest.fixture(scope="module")
def sample(splits: dict[str, list[Problem]]) -> list[Problem]:
    return splits["train"][:4000]


def question_numbers(problem: Problem) -> list[int]:
    """The numbers of the question; of `1/3`, only the 3."""
    return [int(number) for number in re.findall(r"(?:\b1/)?(\d+)", problem.question)]


def calculations(problem: Problem) -> tuple[tuple[str, int, int], ...]:
    """Operation and operands of each step, the larger operand first."""
    found: list[tuple[str, int, int]] = []
    for step in problem.steps:
        a, operator, b = re.split(r"([-+*/])", step.expression)
        found.append((operator, max(int(a), int(b)), min(int(a), int(b))))
    return tuple(found)


def operators(problems: Sequence[Problem]) -> Counter[str]:
    return Counter(operator for problem in problems for operator, _, _ in calculations(problem))


# --- the same everywhere ---------------------------------------------------------------------------------------------


def digest(source: Arithmetic, split: Split) -> str:
    """Of a held-out split in full, of the first 1000 training problems."""
    problems = [source.problem("train", i) for i in range(1000)] if split == "train" else source.load(split).problems
    text = "\n".join(f"{p.question}\n{p.rationale}\n{p.answer}" for p in problems)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("version", [1, 2])
def test_problems_are_the_same_everywhere(version: int) -> None:
    """In every process too: Python salts `hash` anew in each."""
    assert {split: digest(Arithmetic(version=version), split) for split in SPLITS} == DIGESTS[version]


def test_settings_without_a_version_are_of_version_1() -> None:
    """As a checkpoint from before there were versions has saved them."""
    saved = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for key in ("_target_", "version", "unseen_steps"):
        del saved[key]
    assert {split: digest(Arithmetic(**saved), split) for split in ("validation", "test")} == {
        split: DIGESTS[1][split] for split in ("validation", "test")
    }
    assert {split: digest(Arithmetic(**(saved | OTHERS)), split) for split in SPLITS} == DIGESTS_OF_OTHERS


def test_a_problem_depends_on_seed_split_and_index_only() -> None:
    """Whichever is asked for first, and however many."""
    for split in SPLITS:
        source = Arithmetic(version=2, train_size=20, test_size=20, validation_size=20)
        backwards = [source.problem(split, index) for index in reversed(range(20))][::-1]
        assert backwards == source.load(split).problems
        longer = Arithmetic(version=2, train_size=30, test_size=30, validation_size=30)
        assert backwards == longer.load(split).problems[:20]
    source = Arithmetic(version=2)
    assert source.problem("train", 0) != Arithmetic(version=2, seed=1).problem("train", 0)
    assert source.problem("train", 0) != source.problem("test", 0)


# --- splits ----------------------------------------------------------------------------------------------------------


def beginnings(problems: Sequence[Problem]) -> set[tuple[tuple[str, int, int], ...]]:
    """The calculations of all problems, and all that these begin with."""
    return {chain[:n] for chain in map(calculations, problems) for n in range(1, len(chain) + 1)}


def test_sizes(splits: dict[str, list[Problem]]) -> None:
    assert {split: len(problems) for split, problems in splits.items()} == {
        "train": 96_000,
        "validation": 500,
        "test": 500,
    }


def test_few_questions_are_repeated(splits: dict[str, list[Problem]]) -> None:
    """0.3% of the training questions are repeats, nearly all of two steps; none of the held-out splits."""
    distinct = {split: len({problem.question for problem in problems}) for split, problems in splits.items()}
    assert distinct["train"] > 0.995 * len(splits["train"])
    assert distinct["validation"] == distinct["test"] == 500


def test_different_calculations_of_each_length(loaded: dict[str, LoadedSplit]) -> None:
    """Each held-out problem has calculations of its own, so that answers to them are independent of each other."""
    found = {split: {calculations(problem) for problem in loaded[split].problems} for split in SPLITS}
    counts = {split: Counter(map(len, chains)) for split, chains in found.items()}
    assert counts == {
        "train": {2: 905, 3: 9251, 4: 23419},
        "validation": {2: 169, 3: 160, 4: 171},
        "test": {2: 164, 3: 157, 4: 179},
    }
    assert not any(loaded[split].notes for split in SPLITS)


def test_no_chain_is_the_beginning_of_one_in_another_split(splits: dict[str, list[Problem]]) -> None:
    """On the full default splits: a leak that is rare would not show in fewer problems."""
    for split in SPLITS:
        for other in SPLITS:
            if other != split:
                assert not {calculations(problem) for problem in splits[split]} & beginnings(splits[other])


def test_no_question_is_in_two_splits(splits: dict[str, list[Problem]]) -> None:
    train, validation, test = ({problem.question for problem in splits[split]} for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_splits_are_disjoint_across_seeds_and_settings(splits: dict[str, list[Problem]]) -> None:
    train = beginnings(splits["train"])
    for settings in (
        {"seed": 5, "max_steps": 2},
        {"min_steps": 1},
        {"min_steps": 1, "max_steps": 1},
        {"max_factor": 9, "distractors": 1.0},
        {"max_number": 20, "max_factor": 5, "max_result": 100, "branching": 0.15},
        {"unseen_steps": 0.5},
    ):
        other = Arithmetic(version=2, **settings)  # pyright: ignore[reportArgumentType]
        chains = {calculations(problem) for problem in other.load("test").problems}
        assert not train & chains, settings
        # A single step may begin longer chains of any split, where training shows it.
        longer = {chain for chain in beginnings(other.load("test").problems) if len(chain) > 1}
        assert not longer & {calculations(problem) for problem in splits["train"]}, settings


def test_chains_of_one_step_are_split_by_that_step() -> None:
    """And no longer chain of another split begins with one that is held out."""
    source = Arithmetic(version=2, min_steps=1, train_size=6000)
    found = {split: source.load(split).problems for split in SPLITS}
    for split in ("validation", "test"):
        assert any(len(problem.steps) == 1 for problem in found[split])
        for other in SPLITS:
            if other != split:
                assert not {calculations(problem) for problem in found[split]} & beginnings(found[other])


def test_every_step_of_test_is_one_of_training(splits: dict[str, list[Problem]]) -> None:
    """What is new in a test problem by default is the chain, not its single steps, as `docs/data.md` tells."""
    known = {step.text for problem in splits["train"] for step in problem.steps}
    for split in ("validation", "test"):
        assert known.issuperset(step.text for problem in splits[split] for step in problem.steps)


@pytest.mark.parametrize("share", [0.25, 1.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.1, 0.5))])
def test_the_share_of_unseen_steps(share: float) -> None:
    """At least the share, of all steps of the test split, and no more than the few that a training set of this size
    happens to lack; validation has none of them, so that no choice is made by them.
    """
    source = Arithmetic(version=2, unseen_steps=share, train_size=20_000)
    found = {split: source.load(split).problems for split in SPLITS}
    known = {(step.text, key) for p in found["train"] for step, key in zip(p.steps, calculations(p), strict=True)}
    texts, keys = {text for text, _ in known}, {key for _, key in known}
    steps = [(step.text, key) for p in found["test"] for step, key in zip(p.steps, calculations(p), strict=True)]
    unseen = [key not in keys for _, key in steps]
    exact = math.floor(share * len(steps) + 0.5)
    assert exact <= sum(unseen) < exact + 0.005 * len(steps)
    assert all(text not in texts for (text, _), new in zip(steps, unseen, strict=True) if new)
    validated = {key for problem in found["validation"] for key in calculations(problem)}
    assert sum(key in validated for (_, key), new in zip(steps, unseen, strict=True) if new) <= sum(unseen) - exact
    for split in ("validation", "test"):
        assert not {calculations(problem) for problem in found[split]} & beginnings(found["train"])


def test_unseen_steps_are_a_matter_of_version_2() -> None:
    with pytest.raises(UserError, match=r"data\.unseen_steps is 0.5; it must be 0 with data.version=1"):
        Arithmetic(unseen_steps=0.5)


def test_chains_that_are_told_again_are_counted() -> None:
    """Settings with few chains run out of new ones: the note says how many problems share theirs."""
    loaded = Arithmetic(version=2, max_steps=2, max_number=5).load("test")
    distinct = {calculations(problem) for problem in loaded.problems}
    assert len(distinct) < 400
    assert loaded.notes == {"problem with the calculations of another": 500 - len(distinct)}
    old = Arithmetic().load("test")
    assert len({calculations(problem) for problem in old.problems}) == 367
    assert old.notes == {"problem with the calculations of another": 133}


def test_all_problems_branch_where_all_are_to() -> None:
    """Also in a held-out split that has told all its chains of this kind."""
    loaded = Arithmetic(version=2, branching=1.0, distractors=0.0, max_steps=2, test_size=100).load("test")
    assert loaded.notes["problem with the calculations of another"] > 50
    for problem in loaded.problems:
        _, number, each = question_numbers(problem)  # the product is of these two, not of the first number
        assert problem.steps[0].expression == f"{number}*{each}"


def test_unknown_split() -> None:
    with pytest.raises(UserError, match="train, validation, test"):
        Arithmetic().load("dev")  # pyright: ignore[reportArgumentType]


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_are_true_whole_and_within_limits(sample: list[Problem]) -> None:
    for problem in sample:
        assert all(step.is_correct() for step in problem.steps)
        assert all(1 <= int(step.result) <= 40 for step in problem.steps)
        assert max(question_numbers(problem)) <= 9
        assert problem.answer == problem.steps[-1].result


def test_steps_are_found_in_the_rationale(sample: list[Problem]) -> None:
    for problem in sample:
        assert parse_steps(problem.rationale) == (problem.steps, ())
        assert [problem.rationale[step.start : step.end] for step in problem.steps] == [
            step.text for step in problem.steps
        ]
        assert len(problem.rationale.split("\n")) == len(problem.steps)


def test_operands_are_in_the_question_or_earlier_results(sample: list[Problem]) -> None:
    for problem in sample:
        known = set(question_numbers(problem))
        for step in problem.steps:
            assert known.issuperset(operands_and_operator(step.expression)[1])
            known.add(int(step.result))


def test_every_result_is_used(sample: list[Problem]) -> None:
    """No step can be skipped: the result of each is an operand further on."""
    for problem in sample:
        for position, step in enumerate(problem.steps[:-1]):
            later = [operands_and_operator(other.expression)[1] for other in problem.steps[position + 1 :]]
            assert any(int(step.result) in operands for operands in later)


def test_the_order_of_operands_follows_the_words() -> None:
    """ "3 times as many" is 3*14, and 14 boxes of 3 are 14*3: a reader of the question can tell which."""
    source = Arithmetic(operations=["*"], min_steps=1, max_steps=1, branching=0.0, distractors=0.0, train_size=500)
    orders: Counter[bool] = Counter()
    for problem in source.load("train").problems:
        start, factor = question_numbers(problem)
        factor_first = " times " in problem.question
        assert problem.steps[0].expression == (f"{factor}*{start}" if factor_first else f"{start}*{factor}")
        orders[factor_first] += 1
    assert min(orders.values()) > 50


# --- language --------------------------------------------------------------------------------------------------------


def test_situations_are_several_dozen_and_all_told(sample: list[Problem]) -> None:
    assert len({situation.name for situation in SITUATIONS}) == len(SITUATIONS) >= 36
    for situation in SITUATIONS:
        marks = [situation.words[slot] for slot in ("place", "things") if slot in situation.words]
        told = [problem for problem in sample if all(mark in problem.question for mark in marks)]
        assert len({problem.question.split(".")[0] for problem in told}) >= 10, situation.name


def test_every_sentence_is_told() -> None:
    """Each phrasing of each family turns up: none is out of reach."""
    problems = Arithmetic(train_size=6000, branching=0.3).load("train").problems
    text = "\n".join(problem.question for problem in problems)
    for family in {id(situation.family): situation.family for situation in SITUATIONS}.values():
        phrasings = [*family.openings, *family.questions, *family.questions_left]
        phrasings += [move.text for moves in family.moves.values() for move in moves]
        phrasings += [
            phrasing for group in (family.opening_moves, family.groups) for t in group.values() for phrasing in t
        ]
        for phrasing in phrasings:
            words = [re.escape(part) for part in re.split(r"\{\w+\}", phrasing)]
            assert re.search("[\\w ]+?".join(words), text), phrasing


def test_every_operation_has_a_sentence_that_is_always_possible() -> None:
    for situation in SITUATIONS:
        family = situation.family
        assert set(family.moves) == set(family.workings) == set("+-*/")
        for moves in family.moves.values():
            assert {move.then for move in moves} == {"next"} if family.hands_over else "same" in {m.then for m in moves}


def test_text_is_well_formed(sample: list[Problem]) -> None:
    for problem in sample:
        for text in (problem.question, problem.rationale):
            assert not re.search(r"[{}]|  |\bNone\b|\.\.", text)
            sentences = re.split(r"(?<=[.?]) |\n", text)
            assert all(re.match(r"[A-Z0-9]", sentence) and sentence[-1] in ".?" for sentence in sentences)
        assert problem.question.find("?") == len(problem.question) - 1


def test_nouns_agree_with_their_numbers(sample: list[Problem]) -> None:
    nouns = {s.words["thing"]: s.words["things"] for s in SITUATIONS}
    nouns |= {s.words["box"]: s.words["boxes"] for s in SITUATIONS if "box" in s.words}
    ones = 0
    for problem in sample:
        assert not re.search(r"(?<![/\d])1 (?!\w+ly)\w", problem.question)  # a lone 1 is never counted
        for result, noun in re.findall(r">>(\d+) ([a-z ]+?)(?: left| on \w+)?\.", problem.rationale):
            assert noun in (nouns if result == "1" else nouns.values())
            ones += result == "1"
    assert ones > 20


def test_questions_are_short(splits: dict[str, list[Problem]]) -> None:
    lengths = [len(problem.question.split()) for problem in splits["train"]]
    assert sum(lengths) / len(lengths) < 40
    assert max(lengths) < 80


# --- balance ---------------------------------------------------------------------------------------------------------


def share_of_commonest_answer(problems: Sequence[Problem]) -> tuple[str, float]:
    [(answer, count)] = Counter(problem.answer for problem in problems).most_common(1)
    return answer, count / len(problems)


def test_what_always_the_commonest_answer_gets(splits: dict[str, list[Problem]]) -> None:
    """Always 8, the commonest answer of train, gets 6.3% of train, 5.8% of validation and 5.2% of test.

    The commonest answer of test itself gets 5.4% (11).
    """
    shares = {split: share_of_commonest_answer(problems) for split, problems in splits.items()}
    assert {split: answer for split, (answer, _) in shares.items()} == {"train": "8", "validation": "8", "test": "11"}
    assert max(share for _, share in shares.values()) < 0.065
    assert {int(problem.answer) for problem in splits["train"]} == set(range(1, 41))


def test_what_the_commonest_answer_of_each_length_gets(splits: dict[str, list[Problem]]) -> None:
    """Who knows the number of steps and no more gets 7.2% of test, and 7.0% of validation, at best."""
    for split in ("test", "validation"):
        right = 0
        for n_steps in (2, 3, 4):
            answers = Counter(problem.answer for problem in splits[split] if len(problem.steps) == n_steps)
            right += max(answers.values())
        assert right / len(splits[split]) < 0.075


def test_operations_and_lengths_are_balanced(splits: dict[str, list[Problem]]) -> None:
    counts = operators(splits["train"][:10_000])
    assert all(count / counts.total() > 0.16 for count in counts.values())
    lengths = Counter(len(problem.steps) for problem in splits["train"])
    assert set(lengths) == {2, 3, 4}
    assert all(abs(count / lengths.total() - 1 / 3) < 0.01 for count in lengths.values())


# --- difficulty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_number_of_steps(steps: int) -> None:
    problems = Arithmetic(min_steps=steps, max_steps=steps, train_size=200).load("train").problems
    assert {len(problem.steps) for problem in problems} == {steps}


@pytest.mark.parametrize("operations", [["+"], ["-"], ["*"], ["/"], ["+", "-"], ["*", "/"], ["/", "+"]])
def test_operations(operations: list[str]) -> None:
    source = Arithmetic(operations=operations, min_steps=1, max_steps=2, branching=0.0, max_number=50, train_size=200)
    assert set(operators(list(source.load("train").problems))) == set(operations)


def test_limits_on_numbers() -> None:
    source = Arithmetic(max_number=7, max_factor=3, max_result=20, train_size=500)
    for problem in source.load("train").problems:
        assert max(question_numbers(problem)) <= 7
        assert max(int(step.result) for step in problem.steps) <= 20
        assert all(smaller <= 3 for operator, _, smaller in calculations(problem)[1:] if operator == "/")
    large = Arithmetic(max_number=99, max_factor=12, max_result=5000, train_size=500).load("train").problems
    assert max(max(question_numbers(problem)) for problem in large) > 90
    assert max(int(problem.answer) for problem in large) > 1000


def spare_numbers(problem: Problem) -> int:
    """How many numbers of the question no step uses."""
    used = Counter(int(n) for step in problem.steps for n in operands_and_operator(step.expression)[1])
    used.subtract(int(step.result) for step in problem.steps[:-1])
    return len(question_numbers(problem)) - used.total()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_distractors(share: float) -> None:
    problems = Arithmetic(distractors=share, train_size=1000).load("train").problems
    spare = Counter(map(spare_numbers, problems))
    assert set(spare) <= {0, 1}
    assert abs(spare[1] / 1000 - share) < (0.05 if 0 < share < 1 else 1e-9)


def is_chain(problem: Problem) -> bool:
    """Whether each step works on the result of the step before, and on a number of the question."""
    return len(problem.steps) + 1 == len(question_numbers(problem)) and all(
        int(before.result) in operands_and_operator(step.expression)[1]
        for before, step in zip(problem.steps, problem.steps[1:], strict=False)
    )


def test_branching() -> None:
    chains = Arithmetic(branching=0.0, distractors=0.0, train_size=500).load("train").problems
    assert all(map(is_chain, chains))
    branched = Arithmetic(branching=1.0, distractors=0.0, train_size=500, min_steps=2).load("train").problems
    for problem in branched:
        assert len(question_numbers(problem)) == len(problem.steps) + 1
        products = [step for step in problem.steps if "*" in step.expression]
        assert any(
            set(map(int, product.expression.split("*"))) <= set(question_numbers(problem)) for product in products
        )
    assert any(not is_chain(problem) for problem in branched)


def test_a_problem_of_one_step_never_branches() -> None:
    problems = Arithmetic(min_steps=1, branching=1.0, distractors=0.0, train_size=300).load("train").problems
    of_one_step = [problem for problem in problems if len(problem.steps) == 1]
    assert of_one_step
    assert all(map(is_chain, of_one_step))


# --- bad settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("train_size", 0),
        ("validation_size", -3),
        ("test_size", "many"),
        ("min_steps", 0),
        ("min_steps", True),
        ("max_steps", 1),
        ("max_steps", 9),
        ("max_number", 1),
        ("max_factor", 1),
        ("max_factor", 10),
        ("max_result", 1),
        ("version", 0),
        ("version", 3),
        ("version", "2"),
        ("unseen_steps", -0.1),
        ("unseen_steps", 2),
        ("branching", 1.5),
        ("branching", "often"),
        ("branching", float("nan")),
        ("distractors", -0.1),
        ("operations", []),
        ("operations", "+"),
        ("operations", 3),
        ("operations", ["+", "^"]),
        ("operations", ["+", "+"]),
    ],
)
def test_impossible_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}") as error:
        Arithmetic(**{key: value})  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_branching_needs_its_operations() -> None:
    with pytest.raises(UserError, match=r"data\.branching must be 0"):
        Arithmetic(operations=["+", "-"])
    assert Arithmetic(operations=["+", "-"], branching=0.0).operations == ("+", "-")


def test_settings_without_a_problem_are_refused() -> None:
    source = Arithmetic(operations=["/"], branching=0.0, min_steps=8, max_steps=8)
    with pytest.raises(UserError, match="no chain of 8 steps"):
        source.load("train")


def test_the_config_names_every_field_with_its_default() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{Arithmetic.__module__}.{Arithmetic.__qualname__}"
    assert set(config) == {field.name for field in fields(Arithmetic)}
    # But for the version: settings that have none are those of earlier checkpoints.
    assert Arithmetic(**config) == Arithmetic(version=2)
