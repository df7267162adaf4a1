"""What a run says: metrics.jsonl, the console, progress where there is no terminal."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb.errors
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from simcot_latent.errors import UserError
from simcot_latent.logs import RunLog, logged_step, make_console, make_progress, track, wandb_id, warn


def open_log(folder: Path, from_step: int = 0, is_main: bool = True) -> RunLog:
    return RunLog(folder, is_main, from_step, run="", project="", config={})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_line_a_record(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.write(1, {"loss": 3.5, "lrm": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 3.5, "lrm": 1.0}]  # at once, not when the run ends
    log.write(2, {"loss": 3.25})
    log.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 3.5, "lrm": 1.0}, {"step": 2, "loss": 3.25}]


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX's")
@pytest.mark.parametrize("fits", [0, 1, 10])
def test_a_disk_that_is_full_takes_a_line_or_nothing(fits: int, tmp_path: Path) -> None:
    """The system takes the bytes that fit, and only says so by a count."""
    import resource

    log = open_log(tmp_path)
    log.write(1, {"loss": 3.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + fits, hard))
    try:
        with pytest.raises(UserError) as caught:
            log.write(2, {"loss": 3.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path / 'metrics.jsonl'}: cannot be written (File too large)"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.write(2, {"loss": 3.25})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), min_size=1), st.floats()), max_size=4)
)
def test_numbers_survive_and_what_is_no_number_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = open_log(folder)
    records = [{key: value for key, value in record.items() if key != "step"} for record in records]
    for step, record in enumerate(records):
        log.write(step, record)
    assert lines(folder) == [
        {"step": step, **{key: value for key, value in record.items() if math.isfinite(value)}}
        for step, record in enumerate(records)
    ]


def test_going_on_cuts_off_what_came_after(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": step})
    log = open_log(tmp_path, from_step=3)
    log.write(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    open_log(tmp_path).write(1, {"loss": 1.0})
    open_log(tmp_path)
    assert lines(tmp_path) == []


def test_going_on_without_a_file(tmp_path: Path) -> None:
    log = open_log(tmp_path, from_step=3)
    log.write(4, {"loss": 4.0})
    assert [line["step"] for line in lines(tmp_path)] == [4]


def test_going_on_after_a_line_that_was_cut_short(tmp_path: Path) -> None:
    """The disk was full, or the machine lost power."""
    log = open_log(tmp_path)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 2.0})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-8])
    open_log(tmp_path, from_step=1).write(2, {"loss": 2.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_what_is_no_record_is_kept_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{}\n\xff\n\n{"step": 2}\n{"step": 3}\n{"st')
    open_log(tmp_path, from_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert (tmp_path / "metrics.unreadable").read_bytes() == b'{}\n\xff\n{"st\n'
    open_log(tmp_path, from_step=2)  # nothing more to move
    assert (tmp_path / "metrics.unreadable").read_bytes() == b'{}\n\xff\n{"st\n'


def test_going_on_replaces_the_file_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed just before it does, it leaves the file as it was."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, from_step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40))
def test_any_line_is_a_record_or_is_not(line: bytes) -> None:
    step = logged_step(line)
    assert step is None or (type(step) is int and json.loads(line)["step"] == step)


def test_numbers_of_steps() -> None:
    assert logged_step(b'{"step": 3, "loss": 1}') == 3
    for line in (b"", b"{}", b"[]", b"3", b'"step"', b'{"step": null}', b'{"step": 1.0}', b'{"step": true}',
                 b"[" * 100_000, b'{"step": 3', "{\"step\": 3}".encode("utf-16")):  # fmt: skip
        assert logged_step(line) is None


def test_wandb_knows_a_run_that_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = wandb_id(tmp_path, new=True)
    assert re.fullmatch(r"[0-9a-f]{8}", first)
    assert wandb_id(tmp_path, new=False) == first
    second = wandb_id(tmp_path, new=True)
    assert second != first
    assert wandb_id(tmp_path, new=False) == second


def start_wandb(out_dir: Path, from_step: int = 3) -> None:
    RunLog(out_dir, True, from_step, run="first", project="simcot_latent", config={})


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"a b", b"one\ntwo", b"../a", b"what?", b"x" * 129, b"\x00"], ids=lambda c: str(c[:6])
)
def test_an_id_of_wandb_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    """Nothing is the matter with the login."""
    (tmp_path / "wandb_id").write_bytes(content)
    with pytest.raises(UserError, match=r"wandb_id: (holds no id of a wandb run; delete it|not UTF-8)") as caught:
        start_wandb(tmp_path)
    assert "login" not in str(caught.value)


@pytest.mark.parametrize("from_step", [0, 3])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_an_id_of_wandb_that_is_no_file_is_named(make: Callable[[Path], None], from_step: int, tmp_path: Path) -> None:
    """A fifo would wait for ever."""
    make(tmp_path / "wandb_id")
    with pytest.raises(UserError, match=r"wandb_id: is a folder, a device or the like; it must be a file"):
        start_wandb(tmp_path, from_step)


def test_a_variable_that_is_no_id_of_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "my/run")
    with pytest.raises(UserError, match=r"WANDB_RUN_ID=my/run: is no id"):
        start_wandb(tmp_path)
    assert not (tmp_path / "wandb_id").exists()


def test_what_cannot_be_read_or_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("strange\n")
    os.mkfifo(tmp_path / "metrics.unreadable")
    with pytest.raises(UserError, match=r"metrics\.unreadable: is a folder, a device or the like"):
        open_log(tmp_path, from_step=1)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", **options: Any) -> Any:  # root may read anything
        if self.name == "metrics.jsonl" and mode == "rb":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(Permission denied\)"):
        open_log(tmp_path, from_step=1)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run", is_main=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


# --- the console -----------------------------------------------------------------------------------------------------


def test_lines_are_not_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    line = "step 00012/00233 | " + "x" * 300
    make_console().print(line, markup=False)
    assert capsys.readouterr().out == line + "\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = make_console(is_main=False)
    console.print("anything")
    warn(console, "anything")
    assert capsys.readouterr().out == ""


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Questions, paths and what a model writes are no markup."""
    console = make_console()
    odd = "[red] [/b] [link=x] :apple: \\[ 3[/]"
    warn(console, odd)
    assert capsys.readouterr().out == f"warning: {odd}\n"
    table = Table("column")
    table.add_row(odd)
    console.print(table)
    assert odd in capsys.readouterr().out


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of progress for every item, however fast they come."""
    monkeypatch.setattr("simcot_latent.logs.SECONDS_A_LINE", 0.0)


def test_progress_without_a_terminal_waits_between_lines(capsys: pytest.CaptureFixture[str]) -> None:
    items = list(range(1000))
    assert list(track(items, "encoding", make_console())) == items
    assert capsys.readouterr().out.splitlines() == []  # done within SECONDS_A_LINE: nothing to tell


@pytest.mark.usefixtures("no_pause")
def test_progress_without_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    items = list(range(5))
    assert list(track(items, "encoding", make_console())) == items
    out = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in out] == [f"encoding {n}/5" for n in range(1, 6)]
    assert all(line.endswith("/s") for line in out[1:])


@pytest.mark.usefixtures("no_pause")
def test_progress_counts_units(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [["a"] * 32, ["b"] * 32, ["c"] * 4]
    assert list(track(batches, "gsm8k test", make_console(), [len(batch) for batch in batches])) == batches
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "gsm8k test 32/68", "gsm8k test 64/68", "gsm8k test 68/68"
    ]  # fmt: skip


def test_progress_over_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([], "encoding", make_console())) == []


def test_a_bar_leaves_no_trace_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress(make_console()) as progress:
        task = progress.add_task("latent", total=3)
        progress.update(task, completed=2)
    assert capsys.readouterr().out == ""


def test_a_bar_shows_rate_and_time_left_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    with (tmp_path / "screen").open("w+", encoding="utf-8") as screen:
        console.file = screen
        console.width = 120
        with make_progress(console) as progress:
            task = progress.add_task("latent", total=3)
            progress.advance(task)
            progress.advance(task)
            progress.refresh()
        screen.seek(0)
        text = screen.read()
    assert "latent" in text
    assert "2/3" in text
    assert "/s" in text
    assert "0:00:0" in text


# --- wandb (the real package, offline: see end_to_end/test_train.py) -------------------------------------------------


@pytest.mark.parametrize("error", [wandb.errors.UsageError("No API key configured."), ValueError("WANDB_MODE\nis odd")])
def test_a_wandb_that_cannot_start_is_a_mistake_of_the_users(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"run=first.*wandb.*WANDB_MODE=offline") as caught:
        RunLog(tmp_path, True, 0, run="first", project="simcot_latent", config={})
    assert "\n" not in str(caught.value)
