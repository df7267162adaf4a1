"""The list of mutants fits the code as it is: quick, so that whoever changes a line is told of its mutant."""

from __future__ import annotations

import ast
from collections import Counter

import pytest
from mutants import MUTANTS, Mutant
from run import PACKAGE, REPOSITORY, Verdict, judge, stale


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mutant_is_one_line_of_python_and_names_tests_that_are_there(mutant: Mutant) -> None:
    assert stale(mutant, PACKAGE) is None
    assert mutant.new != mutant.old
    ast.parse((PACKAGE / mutant.file).read_text(encoding="utf-8").replace(mutant.old, mutant.new))
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert "golden" not in file, "a recording notices any change"
        assert f"def {name}" in (REPOSITORY / file).read_text(encoding="utf-8")


def test_there_are_many_and_no_two_alike() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []
    assert len(MUTANTS) >= 80
    assert len({mutant.file for mutant in MUTANTS}) >= 15


def test_a_line_that_is_gone_or_there_twice_is_stale() -> None:
    gone = Mutant("metrics.py", "no such line", "pass", ("tests/test_metrics.py",))
    twice = Mutant("metrics.py", "return ", "pass", ("tests/test_metrics.py",))
    assert stale(gone, PACKAGE) == "0 times in metrics.py"
    assert (stale(twice, PACKAGE) or "").endswith("times in metrics.py")


@pytest.mark.slow
def test_the_runner_tells_the_killed_from_the_survivors_and_the_broken() -> None:
    tests = ("tests/test_metrics.py::test_wilson_of_nothing_says_nothing",)
    mutants = [
        Mutant("metrics.py", "return 0.0, 1.0", "return 0.0, 0.5", tests),
        Mutant("metrics.py", "return max(0.0, centre - half)", "return min(0.0, centre - half)", tests),
        Mutant("metrics.py", "from dataclasses import dataclass", "from dataclasses import no_such_name", tests),
        Mutant("metrics.py", "no such line", "pass", tests),
    ]
    assert [judge([mutant])[0].verdict for mutant in mutants] == [
        Verdict.KILLED, Verdict.SURVIVED, Verdict.BROKEN, Verdict.STALE
    ]  # fmt: skip
