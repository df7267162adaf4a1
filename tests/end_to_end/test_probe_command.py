"""python -m simcot_latent.probe: tables and JSON of what thoughts decode to."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from commands import ARITHMETIC, PROBE, REAL_DATA, TINY, TRAIN, Outcome, Trained, contents, run, strict_json

import simcot_latent as sl
from simcot_latent.probing.steps import GroupProbe, QuestionProbe
from simcot_latent.probing.thoughts import gold_groups

AWKWARD = [
    "John's 3 apples, his 4 pears: how many are $5 = 5?",
    'She said "3, or 4?" and left.',
    "C:\\temp\\ has 3 files \\",
    "Zoë hat 3 Äpfel und 4 Birnen: wie viele Früchte? 🍎🍐 三つ",
    "What is ${x} or %(y)s, {a: 1, b: 2} or [1, 2]?",
    "[/b] How many [red] balls :apple: are 1:2 of 6?",
    "'",
    '"',
    "3 + 4 = ? # not a comment",
    " two\nlines\tand a tab ",
    "<|eot|> 14 <|end|> and <<3+4=7>>",
    "'3 pens' and '4 pens'",
]


def probe(run_or_folder: Trained | Path, *arguments: str) -> Outcome:
    folder = run_or_folder.latest if isinstance(run_or_folder, Trained) else run_or_folder
    return run(PROBE, f"ckpt={folder}", "device=cpu", *arguments, folder=folder.parent)


@pytest.mark.parametrize("question", AWKWARD)
def test_a_question_arrives_as_it_was_typed(question: str, latent_run: Trained) -> None:
    before = contents(latent_run.out_dir)
    outcome = probe(latent_run, f"question={question}", "format=json").ok()
    answer = strict_json(outcome.out)
    assert answer["summary"] is None
    (probed,) = answer["probes"]
    assert probed["question"] == question
    assert probed.keys() == {field.name for field in fields(QuestionProbe)}
    assert len(probed["groups"]) == 3
    for group in probed["groups"]:
        assert group.keys() == {field.name for field in fields(GroupProbe)}
        assert 0 <= group["probability"] <= 1
        assert group["gold"] is None
    table = probe(latent_run, f"question={question}").ok().out
    for word in question.split():
        assert word in table
    for group in probed["groups"]:
        assert group["decoded"].split("\n")[0][:20] in table
    assert contents(latent_run.out_dir) == before


def test_a_table_has_a_row_a_thought(latent_run: Trained) -> None:
    question = "Eve has 3 pens and finds 4 more. Then the number of pens doubles. How many pens does Eve have?"
    table = probe(latent_run, f"question={question}").ok().out
    (json_probe,) = strict_json(probe(latent_run, f"question={question}", "format=json").ok().out)["probes"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    numbered = {row[1]: row for row in rows if row[1]}
    assert list(numbered) == ["1", "2", "3", "answer"]
    for i, group in enumerate(json_probe["groups"], start=1):
        right = {True: "yes", False: "no", None: "-"}[group["right"]]
        assert numbered[str(i)][2:] == [group["decoded"], right, f"{group['probability']:.3f}"]
    assert numbered["answer"][2] == json_probe["answer"]


def test_the_command_and_the_library_say_the_same(latent_run: Trained) -> None:
    question = "Gus has 3 eggs and finds 4 more. Then the number of eggs doubles. How many eggs does Gus have?"
    (probed,) = strict_json(probe(latent_run, f"question={question}", "format=json").ok().out)["probes"]
    checkpoint = sl.load_checkpoint(latent_run.out_dir)
    assert sl.decode_steps(checkpoint, sl.think(checkpoint, [question])) == [[g["decoded"] for g in probed["groups"]]]
    assert sl.answer(checkpoint, [question]) == [probed["answer"]]
    ids, probabilities = sl.StepDecoder.from_checkpoint(latent_run.out_dir).decode(
        sl.think(checkpoint, [question]).latents.transpose(0, 1), checkpoint.tokenizer.end_id, 128
    )  # one thought a step: each thought of the one question is a group
    assert [checkpoint.tokenizer.decode(row) for row in ids] == [g["decoded"] for g in probed["groups"]]
    assert probabilities == pytest.approx([g["probability"] for g in probed["groups"]], rel=1e-4)


def mean(values: list[Any]) -> float:
    return sum(map(float, values)) / len(values)


def test_probing_a_set_scores_every_step(latent_run: Trained, sums: Path) -> None:
    data = ("data=gsm8k", f"data.path={sums}", "limit=9")
    answer = strict_json(probe(latent_run, *data, "batch_size=4", "format=json").ok().out)
    probes, summary = answer["probes"], answer["summary"]
    assert len(probes) == summary["n"] == 9
    checkpoint = sl.load_checkpoint(latent_run.out_dir)
    assert [p["answer"] for p in probes] == sl.answer(checkpoint, [p["question"] for p in probes])
    assert summary["accuracy"] == pytest.approx(mean([p["answer"] == p["gold_answer"] for p in probes]))
    assert 0 < summary["accuracy"] < 1

    # Two steps, three groups: the third is taught nothing.
    assert list(summary["by_step"]) == ["1", "2"]
    assert all(p["groups"][2]["gold"] is None and p["groups"][2]["exact"] is None for p in probes)
    for index in (0, 1):
        groups, scores = [p["groups"][index] for p in probes], summary["by_step"][str(index + 1)]
        assert scores["n"] == 9
        for group in groups:
            assert group["exact"] == (group["decoded"] == group["gold"])
            if group["exact"]:
                assert all(group[key] for key in ("operators", "operands", "result", "right"))
                assert group["probability"] == pytest.approx(group["gold_probability"], rel=1e-3)
        for key in ("exact", "operators", "operands", "result", "forced_token_accuracy", "gold_probability"):
            assert scores[key] == pytest.approx(mean([group[key] for group in groups]))
    both = summary["by_step"].values()
    assert summary["all"]["n"] == 18
    assert summary["all"]["exact"] == pytest.approx(mean([scores["exact"] for scores in both]))
    low, high = summary["all"]["exact_ci95"]
    assert low <= summary["all"]["exact"] <= high

    table = probe(latent_run, *data).ok().out
    for word in ("exact match", "operators", "operands", "result", "teacher-forced", "gold"):
        assert word in table
    assert f"{summary['accuracy']:.1%} of 9" in table


def test_other_splits_than_in_training_are_told(tmp_path: Path) -> None:
    """As evals tell it, with what was noticed about the problems; not where the output is JSON."""
    run(TRAIN, *TINY, *ARITHMETIC, "mode=latent", "num_iterations=4", "latent.warmup=0", "out_dir=run",
        folder=tmp_path).ok()  # fmt: skip
    data = ("data=arithmetic", "limit=12")
    assert "warning" not in probe(tmp_path / "run", *data).ok().out
    few = ("data.max_steps=1", "data.min_steps=1", "data.operations=[+]", "data.max_number=4", "data.branching=0")
    told = probe(tmp_path / "run", *data, "data.version=1", *few).ok().out
    assert "warning: data.version=1, but 2 in training" in told
    assert re.search(r"test: \d+ x problem with the calculations of another", told)
    strict_json(probe(tmp_path / "run", *data, "data.version=1", "format=json").ok().out)


@pytest.mark.parametrize("typed", ["data.tolerance=0.3", "tolerance=0.3"])
def test_a_tolerance_holds_for_answers(typed: str, latent_run: Trained, sums: Path) -> None:
    data = ("data=gsm8k", f"data.path={sums}", "limit=21")
    exact = strict_json(probe(latent_run, *data, "format=json").ok().out)
    near = strict_json(probe(latent_run, *data, typed, "format=json").ok().out)
    assert near["probes"] == exact["probes"]
    within = [abs(float(p["answer"] or "inf") - float(p["gold_answer"])) <= 0.3 * float(p["gold_answer"])
              for p in near["probes"]]  # fmt: skip
    assert near["summary"]["accuracy"] == pytest.approx(mean(within))
    assert near["summary"]["accuracy"] > exact["summary"]["accuracy"]
    assert (exact["summary"]["tolerance"], near["summary"]["tolerance"]) == (0.0, 0.3)
    table = probe(latent_run, *data, typed).ok().out
    assert "within 0.3 of gold" in table
    assert len(re.findall(r"│ answer +│ .*│ yes ", table)) == sum(within)
    assert strict_json(probe(latent_run, *data, typed, "tolerance=0", "format=json").ok().out) == exact
    assert "tolerance=1" in probe(latent_run, *data, "tolerance=1").error


def test_batches_change_nothing(latent_run: Trained, sums: Path) -> None:
    data = ("data=gsm8k", f"data.path={sums}", "limit=6", "format=json")
    alone, together = (
        strict_json(probe(latent_run, *data, f"batch_size={size}").ok().out)["probes"] for size in (1, 6)
    )
    for one, other in zip(alone, together, strict=True):
        assert one["answer"] == other["answer"]
        for group, same in zip(one["groups"], other["groups"], strict=True):
            assert group["decoded"] == same["decoded"]
            assert group["probability"] == pytest.approx(same["probability"], rel=1e-4)


def test_a_model_between_stages_is_held_to_what_it_was_taught(tmp_path: Path, latent_run: Trained, sums: Path) -> None:
    """While thoughts stand for the first step only, its thought is to say that step, not all that are left."""
    checkpoint = sl.load_checkpoint(latent_run.out_dir)
    checkpoint.stage = sl.Stage(1, first_written=1)
    question = "Eve has 3 pens and finds 4 more. Then the number of pens doubles. How many pens does Eve have?"
    rationale = "<<3+4=7>> <<7*2=14>>"
    from simcot_latent.data.problem import Problem, parse_steps

    problem = Problem(question, parse_steps(rationale)[0], rationale, "14")
    assert gold_groups(checkpoint, problem) == ["<<3+4=7>>"]


def test_a_weighted_checkpoint_is_refused(weighted_run: Trained) -> None:
    message = probe(weighted_run, "question=How many?").error
    assert "no auxiliary decoder" in message
    assert str(weighted_run.out_dir) in message


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "gsm8k").is_dir(), reason=f"{REAL_DATA} is not there")
def test_twenty_problems_of_gsm8k(tmp_path: Path) -> None:
    data = ("data=gsm8k", f"data.path={REAL_DATA / 'gsm8k'}")
    run(TRAIN, *TINY, *data, "num_iterations=10", "data.train_limit=200", "out_dir=run", folder=tmp_path).ok()
    answer = strict_json(probe(tmp_path / "run", *data, "limit=20", "format=json").ok().out)
    assert answer["summary"]["n"] == 20
