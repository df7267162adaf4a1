"""Probes of many problems as figures, and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from simcot_latent.data.problem import same_number
from simcot_latent.metrics import wilson_interval
from simcot_latent.probing.information import VInformation, text_entropy
from simcot_latent.probing.steps import GroupProbe, QuestionProbe


def summarise(probes: Sequence[QuestionProbe], tolerance: float = 0.0) -> dict[str, Any]:
    """Step scores over all groups with a step, and by step index (the first step is 1); groups that were taught the
    answer apart; answers alongside.

    Args:
        tolerance: of answers, see `same_number`. Steps are compared exactly.
    """
    taught = [(i, g) for probe in probes for i, g in enumerate(probe.groups, start=1) if g.gold is not None]
    scored = [(i, g) for i, g in taught if not g.taught_answer]
    indices = sorted({i for i, _ in scored})
    by_step = {str(i): summarise_groups([g for j, g in scored if i == j]) for i in indices}
    summary: dict[str, Any] = {"n": len(probes), "all": summarise_groups([g for _, g in scored]), "by_step": by_step}
    if scored:  # which step it is is known, so what there is to know is the mean of the steps' entropies
        summary["all"]["text_entropy"] = sum(s["n"] * s["text_entropy"] for s in by_step.values()) / len(scored)
    summary["answer_groups"] = summarise_groups([g for _, g in taught if g.taught_answer])
    for key in ("operators", "operands", "result", "right", *VInformation._fields, "text_entropy"):
        summary["answer_groups"].pop(key, None)  # of steps
    correct = sum(same_number(probe.answer, probe.gold_answer, tolerance) for probe in probes)
    summary["accuracy"] = correct / len(probes)
    summary["ci95"] = list(wilson_interval(correct, len(probes)))
    summary["tolerance"] = tolerance
    return summary


def summarise_groups(groups: Sequence[GroupProbe]) -> dict[str, Any]:
    """Means over groups that have gold."""
    n = len(groups)
    if n == 0:
        return {"n": 0}
    exact = sum(bool(g.exact) for g in groups)
    return {
        "n": n,
        "exact": exact / n,
        "exact_ci95": list(wilson_interval(exact, n)),
        "operators": sum(bool(g.operators) for g in groups) / n,
        "operands": sum(bool(g.operands) for g in groups) / n,
        "result": sum(bool(g.result) for g in groups) / n,
        "right": sum(g.right is True for g in groups) / n,
        "probability": sum(g.probability for g in groups) / n,
        "forced_token_accuracy": sum(g.forced_token_accuracy or 0.0 for g in groups) / n,
        "gold_probability": sum(g.gold_probability or 0.0 for g in groups) / n,
        "v_information": _mean([g.v_information for g in groups]),
        "v_information_bound": _mean([g.v_information_bound for g in groups]),
        "text_entropy": text_entropy([g.gold or "" for g in groups]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def show(text: str) -> str:
    """A group's text in a table cell: steps on one line, an endless one cut."""
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def probe_table(probes: Sequence[QuestionProbe], tolerance: float = 0.0) -> Table:
    """A row a step group, a block a question; `tolerance` as in `summarise`."""
    with_gold = any(probe.gold_answer is not None for probe in probes)
    table = Table("question", "thought", "decoded step", "right", "probability", *(["gold"] if with_gold else []))
    table.columns[0].max_width = 60
    for probe in probes:
        for i, group in enumerate(probe.groups, start=1):
            right = {True: "yes", False: "no", None: "-"}[group.right]
            cells = [probe.question if i == 1 else "", str(i), show(group.decoded), right, f"{group.probability:.3f}"]
            table.add_row(*map(Text, cells + ([show(group.gold or "-")] if with_gold else [])))
        right = "yes" if same_number(probe.answer, probe.gold_answer, tolerance) else "no"
        gold = [f"#### {probe.gold_answer}"] if with_gold else []
        cells = ["", "answer", probe.answer or "(none)", right if with_gold else "", "", *gold]
        table.add_row(*map(Text, cells), end_section=True)
    return table


def summary_table(summary: dict[str, Any]) -> Table:
    """Scores in rows; by step index, over all steps, and of groups that were taught the answer in columns."""
    rows = [
        ("exact", "exact match"),
        ("operators", "operators"),
        ("operands", "operands"),
        ("result", "result"),
        ("right", "arithmetically right"),
        ("probability", "probability"),
        ("forced_token_accuracy", "tokens, teacher-forced"),
        ("gold_probability", "probability of gold"),
        ("v_information", "V-information, bits"),
        ("v_information_bound", "... at most"),
        ("text_entropy", "entropy of gold, bits"),
    ]
    columns = {f"step {name}": scores for name, scores in summary["by_step"].items()} | {"all steps": summary["all"]}
    if summary["answer_groups"]["n"]:
        columns["answers"] = summary["answer_groups"]
    table = Table("thoughts decoded", *columns)
    table.add_row("n", *[str(scores["n"]) for scores in columns.values()])
    for key, title in rows:
        found = [scores.get(key) for scores in columns.values()]
        table.add_row(title, *["-" if value is None else f"{value:.3f}" for value in found])
    return table
