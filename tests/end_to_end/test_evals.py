"""python -m evals.<name>: the report, recomputed from the predictions beside it."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from commands import (
    ARITHMETIC,
    REAL_DATA,
    TINY,
    TRAIN,
    Outcome,
    Trained,
    contents,
    predictions_of,
    read_lines,
    report_in,
    run,
    strict_json,
    write_jsonl,
)

from simcot_latent.data.problem import Problem, parse_steps
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.evaluate import written_steps

GSM8K = "evals.gsm8k"


def evaluate(checkpoint: Path, *arguments: str, name: str = "gsm8k") -> Outcome:
    return run(f"evals.{name}", f"ckpt={checkpoint}", "device=cpu", *arguments, folder=checkpoint.parent)


def report_of(checkpoint: Path, stem: str = "gsm8k.test") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The newest, of a checkpoint by itself or of a run's latest one."""
    report = report_in((checkpoint.parent if checkpoint.name == "latest" else checkpoint) / "evals", stem)
    return strict_json(report.read_text()), read_lines(predictions_of(report))


@pytest.fixture
def checkpoint(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a checkpoint of each mode, since an eval writes beside it."""
    return trained.copy_to(tmp_path / trained.out_dir.parent.name)


def number(text: str | None) -> Fraction | None:
    """The simplest reading of a number, enough for what the tiny models write."""
    match = re.fullmatch(r"-?\d+(\.\d+)?", (text or "").replace(",", ""))
    return Fraction(match.group()) if match else None


def is_right(line: dict[str, Any]) -> bool:
    after_mark = re.search(r"#### ?(-?[\d.,]*\d)", line["output"])
    return after_mark is not None and number(after_mark.group(1)) == number(line["gold"])


def last_is_right(line: dict[str, Any]) -> bool:
    numbers = re.findall(r"\d+(?:\.\d+)?", line["output"])
    return bool(numbers) and number(numbers[-1]) == number(line["gold"])


def wilson(correct: int, n: int) -> list[float]:
    """The 95% interval as the roots of (p - share)^2 = z^2 p (1 - p) / n: what Wilson's formula solves."""
    z2, share = 1.959963984540054**2, correct / n
    a, b, c = 1 + z2 / n, -(2 * share + z2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]


def test_the_report_follows_from_the_predictions(checkpoint: Path, sums: Path) -> None:
    outcome = evaluate(checkpoint, f"data.path={sums}", "batch_size=8").ok()
    report, lines = report_of(checkpoint)

    asked = read_lines(sums / "test.jsonl")
    assert [line["index"] for line in lines] == list(range(21))
    assert [line["question"] for line in lines] == [row["question"] for row in asked]
    assert [line["gold"] for line in lines] == [row["answer"].rpartition("#### ")[2] for row in asked]

    assert [line["correct"] for line in lines] == [is_right(line) for line in lines]
    assert [line["correct_last_number"] for line in lines] == [last_is_right(line) for line in lines]
    correct = sum(map(is_right, lines))
    assert (report["n"], report["correct"]) == (21, correct)
    assert report["accuracy"] == pytest.approx(correct / 21)
    assert report["ci95"] == pytest.approx(wilson(correct, 21), abs=1e-12)
    assert report["accuracy_last_number"] == pytest.approx(sum(map(last_is_right, lines)) / 21)
    assert report["tokens_per_answer"] == pytest.approx(sum(line["n_tokens"] for line in lines) / 21)
    assert report["questions_per_s"] == pytest.approx(21 / report["seconds"])
    assert (report["split"], report["batch_size"], report["dtype"], report["step"]) == ("test", 8, "float32", 60)
    assert report["unfinished"] == sum(not line["finished"] for line in lines)

    assert f"{report['accuracy']:.1%}" in outcome.out
    assert report_in(checkpoint / "evals").name in " ".join(outcome.out.split())


def test_a_latent_model_is_scored_on_its_thoughts_too(latent_run: Trained, sums: Path, tmp_path: Path) -> None:
    checkpoint = latent_run.copy_to(tmp_path / "checkpoint")
    outcome = evaluate(checkpoint, f"data.path={sums}").ok()
    report, lines = report_of(checkpoint)
    # The tiny model says 14 to everything, and that is right of some problems only.
    assert 0 < report["correct"] < 21

    pairs = [
        (said, gold) for line in lines for said, gold in zip(line["decoded_steps"], line["gold_steps"], strict=True)
    ]
    assert [len(line["decoded_steps"]) for line in lines] == [3] * 21
    assert all(line["gold_steps"][2] is None for line in lines)  # two steps, three groups
    assert all(line["decoded_steps"][2] == "" for line in lines), "nobody taught it, so it is not decoded"
    taught = [(said, gold) for said, gold in pairs if gold is not None]
    matches = sum(said == gold for said, gold in taught)
    assert report["steps"] == len(taught) == 42
    assert 0 < matches < 42
    assert report["step_exact_match"] == pytest.approx(matches / 42)
    assert report["step_exact_match_ci95"] == pytest.approx(wilson(matches, 42), abs=1e-12)
    assert "step exact match" in outcome.out
    assert report["different_steps"] == len({said for said, _ in taught})
    assert report["different_gold_steps"] == len({gold for _, gold in taught}) > 1
    # Thoughts count as tokens of the answer: three of them, "#### 14" and the end.
    assert report["thoughts"] == 3
    assert {line["n_tokens"] for line in lines if line["output"] == "#### 14"} == {8}


def test_groups_that_are_taught_the_answer_are_no_steps(latent_run: Trained, sums: Path, tmp_path: Path) -> None:
    """latent.missing=answer: the third group of these problems of two steps has figures of its own."""
    checkpoint = latent_run.copy_to(tmp_path / "checkpoint")
    evaluate(checkpoint, f"data.path={sums}").ok()
    masked, masked_lines = report_of(checkpoint)
    assert not any("answer_group" in key for key in masked)
    config = strict_json((checkpoint / "config.json").read_text())
    config["groups"]["missing"] = "answer"
    (checkpoint / "config.json").write_text(json.dumps(config))
    outcome = evaluate(checkpoint, f"data.path={sums}", "verify=false").ok()
    report, lines = report_of(checkpoint)
    for key in ("steps", "step_exact_match", "step_exact_match_ci95", "different_steps", "different_gold_steps"):
        assert report[key] == masked[key]
    assert [line["decoded_steps"] for line in lines] == [line["decoded_steps"] for line in masked_lines]
    assert [line["gold_steps"] for line in lines] == [line["gold_steps"] for line in masked_lines]
    assert all(line["decoded_answers"] == [] for line in masked_lines)
    assert all(len(line["decoded_answers"]) == 1 for line in lines)
    right = sum(line["decoded_answers"] == [f"#### {line['gold']}"] for line in lines)
    assert report["answer_groups"] == 21
    assert report["answer_group_exact_match"] == pytest.approx(right / 21)
    assert report["answer_group_exact_match_ci95"] == pytest.approx(wilson(right, 21), abs=1e-12)
    assert "groups taught the answer" in outcome.out


def test_a_tolerance_is_applied_and_reported(latent_run: Trained, sums: Path, tmp_path: Path) -> None:
    checkpoint = latent_run.copy_to(tmp_path / "checkpoint")
    exact = evaluate(checkpoint, f"data.path={sums}").ok()
    assert report_of(checkpoint)[0]["tolerance"] == 0.0
    assert "of the gold answer" not in exact.out
    outcome = evaluate(checkpoint, f"data.path={sums}", "tolerance=0.3").ok()
    report, lines = report_of(checkpoint)
    near = [abs(int(line["answer"]) - int(line["gold"])) <= 0.3 * int(line["gold"]) for line in lines if line["answer"]]
    assert sum(near) > sum(map(is_right, lines)) > 0
    assert report["correct"] == sum(near)
    assert report["tolerance"] == 0.3
    assert "0.3 of the gold answer" in outcome.out
    assert "tolerance" in evaluate(checkpoint, f"data.path={sums}", "tolerance=1.5").error


def test_the_tolerance_that_the_data_state(tmp_path: Path) -> None:
    """In training, then in evals, which say so; a tolerance of the command line wins."""
    rows = [{"question": f"Say {n * 7919 % 89}!", "answer": f"#### {10 + n % 3}"} for n in range(60)]
    write_jsonl(tmp_path / "data/train.jsonl", rows)
    write_jsonl(tmp_path / "data/test.jsonl", rows)
    arguments = (*TINY, "mode=weighted", "data=gsm8k", f"data.path={tmp_path / 'data'}", "num_iterations=30")
    arguments += ("learning_rate=0.02", "rationale=none", "eval_examples=6")
    accuracy: dict[str, float] = {}
    for name, tolerance in (("exact", 0.0), ("run", 0.999)):
        run(TRAIN, *arguments, f"data.tolerance={tolerance}", f"out_dir={name}", folder=tmp_path).ok()
        accuracy[name] = read_lines(tmp_path / name / "metrics.jsonl")[-1]["val_accuracy"]
    assert accuracy["exact"] < accuracy["run"]
    latest = tmp_path / "run/latest"
    told = evaluate(latest).ok().out
    assert "data.tolerance=0.999, as in training" in told
    report, lines = report_of(latest)
    assert report["tolerance"] == report["data"]["tolerance"] == 0.999
    near = [abs(float(line["answer"] or "inf") - float(line["gold"])) <= 0.999 * float(line["gold"]) for line in lines]
    assert report["correct"] == sum(near) > sum(map(is_right, lines))
    evaluate(latest, "tolerance=0").ok()
    report, lines = report_of(latest)
    assert (report["tolerance"], report["correct"]) == (0.0, sum(map(is_right, lines)))
    assert "data.tolerance=1" in evaluate(latest, "data.tolerance=1").error


def test_a_weighted_model_is_scored_on_the_steps_it_writes(weighted_run: Trained, sums: Path, tmp_path: Path) -> None:
    """Step by step in their order: one that is missing is wrong, one too many counts for nothing."""
    checkpoint = weighted_run.copy_to(tmp_path / "checkpoint")
    evaluate(checkpoint, f"data.path={sums}").ok()
    report, lines = report_of(checkpoint)
    assert report["thoughts"] == 0
    solutions = [row["answer"] for row in read_lines(sums / "test.jsonl")]
    matches = total = 0
    for line, solution in zip(lines, solutions, strict=True):
        said, gold = (re.findall(r"<<[^<>]*>>", text) for text in (line["output"], solution))
        assert [step for step in line["gold_steps"] if step is not None] == gold
        assert [step for step in line["decoded_steps"] if step] == said
        matches += sum(ours == theirs for ours, theirs in zip(said, gold, strict=False))
        total += len(gold)
    assert (report["steps"], report["step_exact_match"]) == (total, pytest.approx(matches / total))
    assert report["step_exact_match_ci95"] == pytest.approx(wilson(matches, total), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "said", "gold"),
    [
        ("<<1+1=2>>\n<<2*3=6>>\n#### 6", ["<<1+1=2>>", "<<2*3=6>>"], ["<<1+1=2>>", "<<2*3=6>>"]),
        ("Then 1+1 = <<1+1=2>>2\n#### 2", ["<<1+1=2>>", ""], ["<<1+1=2>>", "<<2*3=6>>"]),
        (
            "<<a=2>> <<1+1=2>> <<2-1=1>> <<3=3>>",
            ["<<1+1=2>>", "<<2-1=1>>", "<<3=3>>"],
            ["<<1+1=2>>", "<<2*3=6>>", None],
        ),
        ("#### 6", ["", ""], ["<<1+1=2>>", "<<2*3=6>>"]),
    ],
)
def test_written_steps_beside_gold_ones(text: str, said: list[str], gold: list[str | None]) -> None:
    rationale = "<<1+1=2>> <<2*3=6>>"
    assert written_steps(text, Problem("?", parse_steps(rationale)[0], rationale, "6")) == (said, gold)


def test_where_no_steps_are_written_none_are_scored(weighted_run: Trained, sums: Path, tmp_path: Path) -> None:
    checkpoint = weighted_run.copy_to(tmp_path / "checkpoint")
    config = strict_json((checkpoint / "config.json").read_text())
    config["run"]["rationale"] = "none"
    (checkpoint / "config.json").write_text(json.dumps(config))
    outcome = evaluate(checkpoint, f"data.path={sums}", "limit=2", "verify=false").ok()
    report, lines = report_of(checkpoint)
    assert "step_exact_match" not in report
    assert "step exact match" not in outcome.out
    assert all(line["decoded_steps"] == line["gold_steps"] == [] for line in lines)


def test_the_batch_size_changes_no_answer(checkpoint: Path, sums: Path) -> None:
    """Questions of different lengths, answers that end at different times, some not at all."""
    evaluate(checkpoint, f"data.path={sums}", "batch_size=1").ok()
    alone, alone_lines = report_of(checkpoint)
    for batch_size in (7, 64):
        evaluate(checkpoint, f"data.path={sums}", f"batch_size={batch_size}").ok()
        report, lines = report_of(checkpoint)
        assert lines == alone_lines
        assert report["batch_size"] == batch_size
        same = ("accuracy", "ci95", "n", "correct", "accuracy_last_number", "tokens_per_answer")
        assert {key: report[key] for key in same} == {key: alone[key] for key in same}


def test_limit_split_and_length_of_answers(checkpoint: Path, sums: Path) -> None:
    evaluate(checkpoint, f"data.path={sums}").ok()
    _, all_lines = report_of(checkpoint)
    evaluate(checkpoint, f"data.path={sums}", "limit=5").ok()
    report, lines = report_of(checkpoint)
    assert (report["n"], report["limit"]) == (5, 5)
    assert lines == all_lines[:5]
    evaluate(checkpoint, f"data.path={sums}", "limit=500", "max_new_tokens=2").ok()
    report, lines = report_of(checkpoint)
    assert report["n"] == 21
    assert max(line["n_tokens"] for line in lines) == report["thoughts"] + 2
    assert report["unfinished"] == 21

    before = contents(checkpoint / "evals")
    evaluate(checkpoint, f"data.path={sums}", "split=validation").ok()
    report, lines = report_of(checkpoint, "gsm8k.validation")
    # A tenth of train is held out, and the report of the test set is still there.
    assert report["split"] == "validation"
    assert {line["question"] for line in lines} <= {row["question"] for row in read_lines(sums / "train.jsonl")}
    assert before.items() <= contents(checkpoint / "evals").items()


def test_the_data_are_those_of_training_unless_said_otherwise(tmp_path: Path, sums: Path) -> None:
    arguments = ("mode=weighted", "num_iterations=1", "data.min_steps=1", "data.max_steps=1", "out_dir=run")
    run(TRAIN, *TINY, *ARITHMETIC, *arguments, folder=tmp_path).ok()
    latest = tmp_path / "run" / "latest"
    evaluate(latest, "limit=4", name="arithmetic").ok()
    report, easy = report_of(latest, "arithmetic")
    assert (report["data"]["max_steps"], report["data"]["test_size"]) == (1, 12)
    evaluate(latest, "limit=4", "data.min_steps=4", "data.max_steps=4", name="arithmetic").ok()
    report, hard = report_of(latest, "arithmetic")
    assert (report["data"]["max_steps"], report["data"]["test_size"]) == (4, 12)
    assert sum(len(line["question"]) for line in hard) > 1.5 * sum(len(line["question"]) for line in easy)
    evaluate(latest, "limit=4", f"data.path={sums}", name="gsm8k").ok()
    report, _ = report_of(latest, "gsm8k")
    assert report["data"]["path"] == str(sums)


def test_a_checkpoint_from_before_data_had_versions_keeps_its_test_set(tmp_path: Path) -> None:
    """Its settings have no version: the problems are those of version 1, not of the default now."""
    run(TRAIN, *TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1", "out_dir=run", folder=tmp_path).ok()
    latest = tmp_path / "run" / "latest"
    asked: dict[int, list[str]] = {}
    for version in (2, 1):
        evaluate(latest, "verify=false", name="arithmetic").ok()
        asked[version] = [line["question"] for line in report_of(latest, "arithmetic")[1]]
        assert asked[version] == [p.question for p in Arithmetic(version=version, test_size=12).load("test").problems]
        config = strict_json((latest / "config.json").read_text())
        for key in ("version", "unseen_steps"):
            config["run"]["data"].pop(key, None)
        (latest / "config.json").write_text(json.dumps(config))
    assert asked[1] != asked[2]
    evaluate(latest, "data.version=2", "verify=false", name="arithmetic").ok()
    assert [line["question"] for line in report_of(latest, "arithmetic")[1]] == asked[2]


def test_sampling_is_reproducible(checkpoint: Path, sums: Path) -> None:
    outputs: list[list[str]] = []
    for seed in (0, 0, 1):
        evaluate(checkpoint, f"data.path={sums}", "limit=8", "temperature=3", "max_new_tokens=8", f"seed={seed}").ok()
        outputs.append([line["output"] for line in report_of(checkpoint)[1]])
    assert outputs[0] == outputs[1] != outputs[2]
    evaluate(checkpoint, f"data.path={sums}", "limit=8", "max_new_tokens=8").ok()
    greedy = [line["output"] for line in report_of(checkpoint)[1]]
    evaluate(checkpoint, f"data.path={sums}", "limit=8", "temperature=3", "top_k=1", "max_new_tokens=8").ok()
    assert [line["output"] for line in report_of(checkpoint)[1]] == greedy


@pytest.mark.slow
@pytest.mark.skipif(not (REAL_DATA / "gsm8k").is_dir(), reason=f"{REAL_DATA} is not there")
@pytest.mark.parametrize("mode", ["latent", "weighted"])
def test_the_whole_test_set_of_gsm8k(mode: str, tmp_path: Path) -> None:
    data = ("data=gsm8k", f"data.path={REAL_DATA / 'gsm8k'}")
    arguments = (f"mode={mode}", "num_iterations=30", "data.train_limit=1000", "learning_rate=0.01")
    run(TRAIN, *TINY, *data, *arguments, "out_dir=run", folder=tmp_path).ok()
    latest = tmp_path / "run" / "latest"
    outcome = evaluate(latest, "max_new_tokens=16", "batch_size=64").ok()
    report, lines = report_of(latest)
    assert report["n"] == len(lines) == 1319
    assert "1319/1319" in outcome.out
    assert report["correct"] == sum(line["correct"] for line in lines)
    # A question with U+2028 in it, answers with commas and minus signs: every problem in its place.
    asked = (REAL_DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [line["question"] for line in lines] == [strict_json(row)["question"].strip() for row in asked]


def test_other_splits_than_in_training_are_told(tmp_path: Path) -> None:
    """The test set of another data version, or with other unseen steps, may hold what this model was trained on."""
    run(TRAIN, *TINY, *ARITHMETIC, "mode=weighted", "num_iterations=1", "out_dir=run", folder=tmp_path).ok()
    latest = tmp_path / "run" / "latest"
    assert "warning" not in evaluate(latest, "limit=2", "data.test_size=9", name="arithmetic").ok().out
    told = evaluate(latest, "limit=2", "data.version=1", name="arithmetic").ok().out
    assert "warning: data.version=1, but 2 in training" in told
    told = evaluate(latest, "limit=2", "data.unseen_steps=0.5", name="arithmetic").ok().out
    assert "warning: data.unseen_steps=0.5, but 0.0 in training" in told
