"""Names of reports: what decides on the numbers decides on the name, and nothing else does."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simcot_latent import reports
from simcot_latent.data.problem import Problem

DECODING: dict[str, Any] = {"temperature": 0.0, "seed": None, "top_k": None, "max_new_tokens": 256, "dtype": "float32"}


def name_of(step: int = 5, weights: str = "w", data: str = "d", **decoding: Any) -> str:
    files = reports.report_files(Path("out"), "gsm8k", "test", step, DECODING | decoding, [weights, data])
    assert files.predictions == files.report.with_suffix(".predictions.jsonl")
    return files.report.name


@pytest.mark.parametrize(
    "other",
    [
        {"step": 6}, {"weights": "x"}, {"data": "e"}, {"top_k": 5}, {"max_new_tokens": 8}, {"dtype": "bfloat16"},
        {"temperature": 0.7, "seed": 0}, {"temperature": 0.7, "seed": 1}, {"loop_settings": {"compression": 5}},
    ],
)  # fmt: skip
def test_what_would_overwrite_another_does_not(other: dict[str, Any]) -> None:
    assert name_of(**other) != name_of()


def test_names_can_be_read() -> None:
    assert name_of().startswith("gsm8k.test.step5.greedy.")
    assert name_of(temperature=0.7, seed=3).startswith("gsm8k.test.step5.t0.7.seed3.")
    assert name_of() == name_of()
    assert len(name_of().split(".")) == 6


def test_the_data_are_questions_and_gold_answers_in_their_order() -> None:
    one, two = Problem("How many?", (), "", "3"), Problem("And now?", (), "", "4")
    found = reports.hash_of_problems([one, two])
    assert found == reports.hash_of_problems([replace(one, rationale="It is 3."), two])
    others = [[two, one], [one], [one, replace(two, answer="5")], [replace(one, question="What?"), two]]
    assert found not in [reports.hash_of_problems(other) for other in others]


def test_seeds_of_one_configuration() -> None:
    config = {"seed": 0, "out_dir": "runs/a", "learning_rate": 1e-3, "latent": {"n_latents": 5}}
    one = reports.hash_of_configuration(config)
    assert one == reports.hash_of_configuration(dict(reversed((config | {"seed": 1, "out_dir": "b"}).items())))
    assert one != reports.hash_of_configuration(config | {"learning_rate": 2e-3})
    assert one != reports.hash_of_configuration(config | {"latent": {"n_latents": 4}})


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "package/reports.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr(reports, "__file__", str(file))
    found = []
    git("init")
    for step in ("nothing is tracked", "committed", "changed"):
        if step == "committed":
            git("add", ".")
            git("commit", "-m", "first")
        if step == "changed":
            file.write_text("x = 1\n")
        reports.commit.cache_clear()
        found.append(reports.commit())
    reports.commit.cache_clear()
    head = git("rev-parse", "HEAD")
    assert found == [None, head, head + "+"]
