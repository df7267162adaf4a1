"""GSM8K and GSM8K-Aug, from small files written here and, where they lie beside the repository, from the real ones."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from simcot_latent.data.format import AnswerFormat, Example, encode_problem
from simcot_latent.data.problem import Problem, same_number
from simcot_latent.data.sources import LoadedSplit, Split
from simcot_latent.data.sources.files import MALFORMED, WrittenSolutions
from simcot_latent.data.sources.gsm8k import GSM8K
from simcot_latent.data.sources.gsm8k_aug import GSM8KAug
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.logs import make_console
from simcot_latent.training.setup import load_split

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = REPOSITORY.parent / "shared" / "data"
ALL_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def row(number: int, name: str = "train") -> dict[str, str]:
    """A row of GSM8K."""
    return {
        "question": f"{name} question {number}: how much is {number} and 1?",
        "answer": f"It is {number} + 1 = <<{number}+1={number + 1}>>{number + 1}.\n#### {number + 1:,}",
    }


def rows(count: int, name: str = "train") -> list[dict[str, str]]:
    return [row(number, name) for number in range(count)]


def write_jsonl(file: Path, values: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return file


def write_parquet(file: Path, values: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), file)
    return file


def questions(source: WrittenSolutions, split: Split) -> list[str]:
    return [problem.question for problem in source.load(split).problems]


def message(source: WrittenSolutions, split: Split = "train") -> str:
    """The error of a load, which must be one line."""
    with pytest.raises(UserError) as caught:
        source.load(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """50 problems to train on and 5 to test on, as JSONL."""
    write_jsonl(tmp_path / "train.jsonl", rows(50))
    write_jsonl(tmp_path / "test.jsonl", rows(5, "test"))
    return tmp_path


# --- GSM8K: what is read ---------------------------------------------------------------------------------------------


def test_a_row_becomes_a_problem(folder: Path) -> None:
    write_jsonl(folder / "test.jsonl", [row(1233)])
    [problem] = GSM8K(path=str(folder)).load("test").problems
    assert problem.question == "train question 1233: how much is 1233 and 1?"
    assert problem.rationale == "It is 1233 + 1 = <<1233+1=1234>>1234."
    assert problem.answer == "1234"
    [step] = problem.steps
    assert (step.expression, step.result, step.start, step.end) == ("1233+1", "1234", 17, 32)


JSON_FORMS = {
    "one line": lambda values: json.dumps({"version": 1, "data": values}),
    "data first": lambda values: json.dumps({"data": values, "version": 1}),
    "first line ends in a comma": lambda values: '{"version": 1,\n"data": ' + json.dumps(values) + "}",
    "first line ends in a bracket": lambda values: '{"version": 1, "data": [\n' + json.dumps(values)[1:] + "}",
    "a list": lambda values: "\n" + json.dumps(values),
    "a row per line": lambda values: "\n".join(map(json.dumps, values)),
    "rows of several keys": lambda values: "\n".join(json.dumps({"data": [1], **value}) for value in values),
    "a row in several lines": lambda values: json.dumps(values[0], indent=1),
    "a single line": lambda values: json.dumps({"data": [1], **values[0]}),
}


@pytest.mark.parametrize("form", JSON_FORMS)
def test_json_in_any_order_and_indentation(form: str, tmp_path: Path) -> None:
    single = form in ("a row in several lines", "a single line")
    (tmp_path / "mine.json").write_text(JSON_FORMS[form](rows(5)))
    asked = questions(GSM8K(path=str(tmp_path / "mine.json")), "test")
    assert asked == [value["question"] for value in rows(1 if single else 5)]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"version": 1, "data": [{]}', ":1: not valid JSON"),
        ('{"version": 1,\n"data": [\n{]}', ":3: not valid JSON"),
        (json.dumps(row(1)) + '\n{"question": ', ":2: not valid JSON"),
        ('{"version": 1, "rows": []}', 'mine.json row 1: no "question"'),
    ],
)
def test_broken_json_is_named_with_its_line(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(text)
    assert place in message(GSM8K(path=str(tmp_path / "mine.json")), "test")


def test_splits_of_a_folder(folder: Path) -> None:
    source = GSM8K(path=str(folder))
    train, validation, test = questions(source, "train"), questions(source, "validation"), questions(source, "test")
    assert test == [value["question"] for value in rows(5, "test")]
    assert len(validation) == 5  # a tenth of train, as 500 would be more than that
    assert not set(train) & set(validation)
    everything = [value["question"] for value in rows(50)]
    assert sorted(train + validation) == sorted(everything)
    assert [q for q in everything if q in train] == train  # in the order of the file
    assert [q for q in everything if q in validation] == validation


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (4, 1), (9, 1), (26, 3), (50, 5), (100, 10), (200, 10)])
def test_size_of_validation(tmp_path: Path, count: int, held_out: int) -> None:
    source = GSM8K(path=str(write_jsonl(tmp_path / "train.jsonl", rows(count))), validation_size=10)
    assert len(questions(source, "validation")) == held_out
    assert len(questions(source, "train")) == count - held_out


def test_validation_does_not_depend_on_the_order(folder: Path) -> None:
    before = set(questions(GSM8K(path=str(folder)), "validation"))
    write_jsonl(folder / "train.jsonl", rows(50)[::-1])
    assert set(questions(GSM8K(path=str(folder)), "validation")) == before


def test_a_repeated_question_is_on_one_side(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [*rows(40), *rows(40)])
    source = GSM8K(path=str(file))
    train, validation = questions(source, "train"), questions(source, "validation")
    assert (len(train), len(validation)) == (72, 8)
    assert not set(train) & set(validation)


def test_train_limit(folder: Path) -> None:
    everything, limited = GSM8K(path=str(folder)), GSM8K(path=str(folder), train_limit=7)
    assert questions(limited, "train") == questions(everything, "train")[:7]
    assert questions(limited, "validation") == questions(everything, "validation")
    assert questions(limited, "test") == questions(everything, "test")


def test_a_validation_file_is_used(folder: Path) -> None:
    write_jsonl(folder / "valid.jsonl", rows(3, "valid"))
    source = GSM8K(path=str(folder))
    assert questions(source, "validation") == [value["question"] for value in rows(3, "valid")]
    assert len(questions(source, "train")) == 50


def test_a_single_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "mine.jsonl", rows(20))
    source = GSM8K(path=str(file))
    assert len(questions(source, "train")) == 18
    assert len(questions(source, "validation")) == 2
    assert len(questions(source, "test")) == 20


def test_every_kind_of_file_gives_the_same(folder: Path, tmp_path: Path) -> None:
    expected: dict[Split, Sequence[Problem]] = {}
    for split in ALL_SPLITS:
        expected[split] = GSM8K(path=str(folder)).load(split).problems
    parquet, hub, as_json = tmp_path / "parquet", tmp_path / "hub", tmp_path / "json"
    for name, values in (("train", rows(50)), ("test", rows(5, "test"))):
        write_parquet(parquet / f"{name}.parquet", values)
        # the hub's own layout, with another configuration beside, in two shards
        half = len(values) // 2
        write_parquet(hub / "main" / f"{name}-00000-of-00002.parquet", values[:half])
        write_parquet(hub / "main" / f"{name}-00001-of-00002.parquet", values[half:])
        write_parquet(hub / "socratic" / f"{name}-00000-of-00001.parquet", rows(1, "socratic"))
        as_json.mkdir(exist_ok=True)
        (as_json / f"{name}.json").write_text(json.dumps(values, indent=1))
    for path in (parquet, hub, hub / "main", as_json):
        for split, problems in expected.items():
            assert GSM8K(path=str(path)).load(split).problems == problems, path


def test_line_ends(tmp_path: Path) -> None:
    values = rows(3)
    values[1]["question"] = "What do \u2028 and \x85 and \x0b stand for?"  # `str.splitlines` would split at each
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    expected = [value["question"] for value in values]
    file = tmp_path / "test.jsonl"
    for text in [
        "\n".join(lines),
        "\n".join(lines) + "\n\n \n",
        "\r\n".join(lines) + "\r\n",
        "\ufeff" + "\n".join(lines),
    ]:
        file.write_bytes(text.encode())
        assert questions(GSM8K(path=str(file)), "test") == expected


def test_notes_count_what_is_odd(tmp_path: Path) -> None:
    values = [
        {"question": "q1", "answer": "<<X/2=0.5X>> and <<1+1=2>>2 and <<oh\n#### 2"},
        {"question": "q2", "answer": "<<10/3=3.33>>3.33\n#### 3.33"},
        {"question": "q3", "answer": "no step\n#### five"},
    ]
    loaded = GSM8K(path=str(write_jsonl(tmp_path / "test.jsonl", values))).load("test")
    assert len(loaded.problems) == 3
    assert loaded.problems[0].rationale == "<<X/2=0.5X>> and <<1+1=2>>2 and <<oh"
    assert loaded.notes == {
        MALFORMED: 2,
        "step whose result is rounded or wrong": 1,
        "problem without a step": 1,
        "answer that is not a number": 1,
    }


def test_what_becomes_of_a_malformed_step(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As its note says: text in a whole solution, left out of the steps alone and of the thoughts."""
    row = {"question": "q", "answer": "so <<7*21=147>>147, <<sqrt(147)=12.1243>>12.1243\n#### 12.1243"}
    loaded = GSM8K(path=str(write_jsonl(tmp_path / "test.jsonl", [row]))).load("test")
    (note,) = loaded.notes
    assert "text where whole solutions are written" in note
    assert "left out where steps alone are (or thoughts)" in note

    def written(rationale: Any) -> Example:
        return encode_problem(tokenizer, loaded.problems[0], AnswerFormat(), rationale)

    assert tokenizer.decode(written("natural").rationale.ids) == "so <<7*21=147>>147, <<sqrt(147)=12.1243>>12.1243\n"
    assert tokenizer.decode(written("equations").rationale.ids) == "<<7*21=147>>\n"
    assert [tokenizer.decode(step.ids) for step in written("equations").steps] == ["<<7*21=147>>"]


def test_text_behind_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    values = [
        {"question": "q1", "answer": "a\n#### 7\nThe answer is: 7"},
        {"question": "q2", "answer": "b\n#### 8 pens"},
        {"question": "q3", "answer": "c\n#### 9"},
    ]
    loaded = GSM8K(path=str(write_jsonl(tmp_path / "test.jsonl", values))).load("test")
    assert [problem.answer for problem in loaded.problems] == ["7", "8", "9"]
    assert loaded.notes == {"answer with text behind it, left out": 2, "problem without a step": 3}


# --- GSM8K: what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "q", "answer": "#### 1"', "not valid JSON (Expecting ',' delimiter, column 37)"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[1]", "a list, not an object"),
        ("null", "null, not an object"),
        ('{"question": "q"}', 'no "answer"'),
        ('{"answer": "#### 1"}', 'no "question"'),
        ('{"question": "q", "answer": null}', 'no "answer"'),
        ('{"question": "q", "answer": 5}', '"answer" is a number, not a text'),
        ('{"question": ["q"], "answer": "#### 1"}', '"question" is a list, not a text'),
        ('{"question": " ", "answer": "#### 1"}', "the question is empty"),
        ('{"question": "q", "answer": "it is 1"}', 'no "####" before the final answer'),
        ('{"question": "q", "answer": "it is 1\\n#### "}', 'no answer behind "####"'),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    good = json.dumps(row(1))
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join([good] * 11 + [line, good]))
    error = message(GSM8K(path=str(file)))
    assert error.startswith(f"{file}:12: {says}"), error
    assert error.endswith('every row must be an object with "question" and "answer"')


def test_a_broken_line_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(json.dumps(row(1)).encode() + b'\n{"question": "caf\xe9"}\n')
    assert message(GSM8K(path=str(file))) == f"{file}:2: not UTF-8 text (byte 0xe9); save it as UTF-8"


def test_a_broken_json_list(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    file.write_text('[\n{"question": "q", "answer": "#### 1"},\n{"question" "q"}\n]')
    assert message(GSM8K(path=str(file))).startswith(f"{file}:3: not valid JSON (Expecting ':' delimiter")
    file.write_text('[{"question": "q", "answer": "#### 1"}, {"question": "q"}]')
    assert message(GSM8K(path=str(file))).startswith(f'{file} row 2: no "answer"')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[\n{"question": "q", "answer": "#### 1"},\n{"question" "q"}\n]', ":3: not valid JSON (Expecting ':' delim"),
        ('[{"question": "q", "answer": "#### 1"}, {"question": "q"}]', ' row 2: no "answer"'),
        ('{\n"question": "q",\n"answer": "it is 1"\n}', ' row 1: no "####"'),
        ('[1]\n[2]', ":1: a list, not an object"),
        ('[{"question": "q", "answer": "#### 1"}]\n{"question": "q"}', ":1: a list, not an object"),
        ('{"question": "q"}', ':1: no "answer"'),
        ('{"question": "q",\n{"question": "q", "answer": "#### 1"}', ":1: not valid JSON"),
        ("null", ":1: null, not an object"),
    ],
)  # fmt: skip
def test_a_broken_value_named_jsonl(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(text)
    assert message(GSM8K(path=str(file))).startswith(f"{file}{says}")


@pytest.mark.parametrize(
    ("name", "text"),
    [("train.jsonl", ""), ("train.jsonl", "\n \n"), ("train.json", "[]"), ("train.jsonl", "[]")],
)
def test_an_empty_file(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert message(GSM8K(path=str(file))).startswith(f"{file}: the file is empty")
    assert message(GSM8K(path=str(tmp_path))).startswith(f"{file}: the file is empty")


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    assert message(GSM8K(path=str(file))).startswith(f"{file}: not a parquet file that can be read")
    write_parquet(file, [{"question": "q", "solution": "#### 1"}])
    assert message(GSM8K(path=str(file))).startswith(f'{file} row 1: no "answer"')


def test_paths_that_hold_nothing(tmp_path: Path, folder: Path) -> None:
    missing = tmp_path / "missing"
    assert message(GSM8K(path=str(missing))).startswith(f"data.path={missing} does not exist; looked for")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert message(GSM8K(path=str(empty))).startswith(f"{empty}: no data in this folder; looked for")
    assert message(GSM8K(path=str(empty))).endswith("; it holds nothing")
    for name in ("train.csv", "notes.md", "train.txt"):
        (empty / name).touch()
    (empty / "raw").mkdir()
    assert message(GSM8K(path=str(empty))).endswith("; it holds notes.md, raw/, train.csv, train.txt")
    csv = tmp_path / "train.csv"
    csv.write_text("question,answer\n")
    assert message(GSM8K(path=str(csv))).endswith(
        "must end in one of .jsonl, .json, .parquet (text also with .gz or .zst behind it)"
    )
    (folder / "train.jsonl").unlink()
    has_test = f"{folder} has no train split; it has: test; the folder holds empty/, test.jsonl, train.csv"
    assert message(GSM8K(path=str(folder))) == has_test
    assert message(GSM8K(path=str(folder)), "validation") == has_test
    assert message(GSM8K(path=str(folder)), "tset") == "split='tset': choose one of train, validation, test"  # pyright: ignore[reportArgumentType]


def test_folders_that_are_ambiguous_or_incomplete(folder: Path, tmp_path: Path) -> None:
    write_parquet(folder / "train.parquet", rows(2))
    assert "train.jsonl, train.parquet are all train data; keep one" in message(GSM8K(path=str(folder)))
    shards = tmp_path / "shards"
    write_parquet(shards / "train-00000-of-00002.parquet", rows(2))
    assert "1 of 2 train files are there" in message(GSM8K(path=str(shards)))


# --- layouts that people have ----------------------------------------------------------------------------------------


def as_jsonl(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def write_zst(file: Path, data: bytes) -> None:
    with pyarrow.output_stream(str(file), compression="zstd") as stream:
        stream.write(data)


def write_layout(layout: str, folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    """The same rows in a layout; with shards, of three files."""
    parts = [train[:20], train[20:40], train[40:]]
    if layout == "hub shards with a digest":
        for i, part in enumerate(parts):
            write_parquet(folder / f"data/train-0000{i}-of-00003-a09b74b3ef9c3b5{i}.parquet", part)
        write_parquet(folder / "data/test-00000-of-00001-0123456789abcdef.parquet", test)
    elif layout == "converted":
        for i, part in enumerate(parts):
            write_parquet(folder / f"main/train/000{i}.parquet", part)
        write_parquet(folder / "main/test/0000.parquet", test)
    elif layout == "converted, large":
        for i, part in enumerate(parts):
            write_parquet(folder / f"default/partial-train/000{i}.parquet", part)
        write_parquet(folder / "default/test/0000.parquet", test)
    elif layout == "save_to_disk":
        datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}
        ).save_to_disk(folder)
    elif layout == "names before the split":
        for name, values in (("train", train), ("test", test)):
            (folder / f"gsm_{name}.json").write_text(json.dumps(values))
    elif layout == "gz":
        for name, values in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(as_jsonl(values)))
    elif layout == "zst":
        for name, values in (("train", train), ("test", test)):
            write_zst(folder / f"{name}.jsonl.zst", as_jsonl(values))
    elif layout == "blank lines":
        for name, values in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl").write_bytes(b"\n" + as_jsonl(values).replace(b"\n", b"\n \r\n\n"))
    elif layout == "under data":
        for name, values in (("train", train), ("test", test)):
            (folder / f"{name}.json").write_text(json.dumps({"version": 1, "data": values}, indent=1))
    elif layout == "a list named .jsonl":
        for name, values in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl").write_text(json.dumps(values, indent=1 if name == "train" else None) + "\n\n")
    elif layout == "under data, named .jsonl":
        for name, values in (("train", train), ("test", test)):
            text = json.dumps({"data": values}, indent=1 if name == "train" else None)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    elif layout == "under data, on one line":
        for name, values in (("train", train), ("test", test)):
            (folder / f"{name}.json").write_text(json.dumps({"data": values}))


LAYOUTS = (
    "hub shards with a digest", "converted", "converted, large", "save_to_disk", "names before the split", "gz", "zst",
    "blank lines", "under data", "under data, on one line", "a list named .jsonl", "under data, named .jsonl",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(layout: str, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_layout(layout, other, rows(50), rows(5, "test"))
    for split in ALL_SPLITS:
        theirs = GSM8K(path=str(other)).load(split)
        assert theirs == GSM8K(path=str(folder)).load(split)


def test_what_the_published_code_writes(tmp_path: Path) -> None:
    """Coconut's preprocessing: gsm_train.json, gsm_valid.json and gsm_test.json, a list of objects each."""
    for name in ("train", "valid", "test"):
        values = [{"question": f"{name} {i}?", "steps": [f"<<{i}+1={i + 1}>>"], "answer": str(i + 1)} for i in range(4)]
        (tmp_path / f"gsm_{name}.json").write_text(json.dumps(values))
    source = GSM8KAug(path=str(tmp_path))
    for name, split in zip(("train", "valid", "test"), ALL_SPLITS, strict=True):
        assert questions(source, split) == [f"{name} {i}?" for i in range(4)]


def test_one_saved_table_is_of_its_split(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(30)).save_to_disk(tmp_path / "any")
    assert len(questions(GSM8K(path=str(tmp_path / "any")), "test")) == 30, "as a single file: train and test"
    datasets.Dataset.from_list(rows(30), split=datasets.NamedSplit("train")).save_to_disk(tmp_path / "train")
    assert len(questions(GSM8K(path=str(tmp_path / "train")), "train")) == 27
    assert "has no test split; it has: train" in message(GSM8K(path=str(tmp_path / "train")), "test")
    next((tmp_path / "train").glob("*.arrow")).write_bytes(b"broken")
    assert "not a whole folder of save_to_disk" in message(GSM8K(path=str(tmp_path / "train")))
    other = datasets.DatasetDict({"socratic": datasets.Dataset.from_list(rows(3))})
    other.save_to_disk(tmp_path / "other")
    assert message(GSM8K(path=str(tmp_path / "other"))).endswith(
        "no train, validation or test split; it holds socratic"
    )


def test_what_is_not_read_is_named(folder: Path) -> None:
    for name in ("train_socratic.jsonl", "train.csv", "backup_train.jsonl", "README.md"):
        (folder / name).write_text("{}")
    loaded = GSM8K(path=str(folder)).load("test")
    unread = [note for note in loaded.notes if note.startswith("file that is not read")]
    assert sorted(unread) == [
        f"file that is not read ({name})" for name in ("backup_train.jsonl", "train.csv", "train_socratic.jsonl")
    ]


def test_files_of_other_kinds_are_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["train.ndjson", "train.jsonl.xz", "more.bz2", "more.csv.gz", "TRAIN.txt", "Test.JSONL", "old.zip"]
    for name in (*names, "README.md", "notes.txt", "LICENSE"):
        (folder / name).write_text("{}")
    expected = sorted(f"file that is not read ({name})" for name in names)
    for split in ALL_SPLITS:
        assert sorted(GSM8K(path=str(folder)).load(split).notes) == expected
    for split in ("train", "validation"):
        load_split(GSM8K(path=str(folder)), split, make_console())
    printed = capsys.readouterr()
    assert sorted(re.findall(r"file that is not read \(.*\)", printed.out + printed.err)) == expected


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_broken_row_of_a_packed_file_is_named(suffix: str, tmp_path: Path) -> None:
    file, data = tmp_path / f"train.jsonl{suffix}", as_jsonl(rows(2)) + b'\n{"question": "q"}\n'
    file.write_bytes(gzip.compress(data)) if suffix == ".gz" else write_zst(file, data)
    assert message(GSM8K(path=str(tmp_path))).startswith(f'{file}:4: no "answer"')
    packed = file.read_bytes()
    for damaged in (packed[: len(packed) // 2], b"no archive", packed[:20] + b"xxxx" + packed[24:]):
        file.write_bytes(damaged)
        assert message(GSM8K(path=str(file))).startswith(f"{file}: not a whole {suffix} file")


def test_shards_that_are_packed_differently(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test-00000-of-00003.jsonl", rows(2))
    (tmp_path / "test-00001-of-00003.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows(4)[2:])))
    write_zst(tmp_path / "test-00002-of-00003.jsonl.zst", as_jsonl(rows(5)[4:]))
    source = GSM8K(path=str(tmp_path))
    assert questions(source, "test") == [value["question"] for value in rows(5)]
    write_jsonl(tmp_path / "test-00002-of-00003.jsonl", rows(2))
    assert "are the same shard; keep one" in message(source, "test")


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    for i in (0, 1, 3):
        write_parquet(tmp_path / f"default/train/000{i}.parquet", rows(2))
    assert "3 of 4 train files are there (train/0000.parquet, " in message(GSM8K(path=str(tmp_path)))
    for digest in ("a09b74b3ef9c3b56", "b09b74b3ef9c3b56"):
        write_parquet(tmp_path / f"twice/train-00000-of-00001-{digest}.parquet", rows(2))
    assert "are the same shard; keep one" in message(GSM8K(path=str(tmp_path / "twice")))


@pytest.mark.parametrize("where", ["question", "answer"])
def test_half_a_character_is_named(where: str, tmp_path: Path) -> None:
    """JSON can spell what no UTF-8 file can hold: the reports would fail after all answers are there."""
    values = rows(3)
    values[1] |= {where: "Tom \ud83d has. " + values[1][where]}
    (tmp_path / "train.jsonl").write_bytes(as_jsonl(values))
    assert message(GSM8K(path=str(tmp_path))).startswith(f"{tmp_path / 'train.jsonl'}:2: holds U+D83D, half of")


def test_one_problem_cannot_be_split(tmp_path: Path) -> None:
    source = GSM8K(path=str(write_jsonl(tmp_path / "one.jsonl", rows(1))))
    assert "give at least two" in message(source)
    assert len(questions(source, "test")) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("path", ""), ("path", 5), ("hub_id", ""), ("hub_id", None), ("hub_config", 3), ("validation_size", 0)]
    + [("validation_size", 2.5), ("validation_size", None), ("validation_size", True), ("train_limit", 0)]
    + [("train_limit", "10")],
)
def test_impossible_fields(key: str, value: object) -> None:
    for source in (GSM8K, GSM8KAug):
        with pytest.raises(UserError, match=rf"^data\.{key}={re.escape(repr(value))}: must be "):
            source(**{key: value})  # pyright: ignore[reportArgumentType]


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_dataset(hub_id: str, hub_config: str | None) -> datasets.DatasetDict:
        asked.append((hub_id, hub_config))
        names = {"train": rows(50), "test": rows(5, "test")}
        return datasets.DatasetDict({name: datasets.Dataset.from_list(values) for name, values in names.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ALL_SPLITS:
        assert GSM8K().load(split).problems == GSM8K(path=str(folder)).load(split).problems
    assert set(asked) == {("openai/gsm8k", "main")}
    assert message(GSM8KAug()) == 'zen-E/GSM8k-Aug train row 1: no "steps"; every row must be ' + GSM8KAug.shape


def test_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub_id: str, hub_config: str | None) -> None:
        raise ConnectionError(f"Couldn't reach {hub_id}\nRetrying")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = message(GSM8K())
    assert "openai/gsm8k" in error
    assert "ConnectionError" in error
    assert "data.path=" in error


# --- GSM8K-Aug -------------------------------------------------------------------------------------------------------

AUG_LINE = "How many?||<<600*30/100=180>> <<180+60=1,240>> #### 1,240"
AUG_PROBLEM = ("How many?", "<<600*30/100=180>> <<180+60=1,240>>", "1240")


def parts(problem: Problem) -> tuple[str, str, str]:
    return problem.question, problem.rationale, problem.answer


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.txt", AUG_LINE),
        ("test.txt", AUG_LINE + "\r\n\n"),
        *(
            (name, text)
            for value in [
                {"question": "How many?", "steps": AUG_PROBLEM[1].split(), "answer": "1,240"},
                {"question": "How many?", "steps": AUG_PROBLEM[1].split(), "answer": 1240},
                {"question": "How many?", "cot": AUG_PROBLEM[1], "answer": "#### 1,240"},
            ]
            for name, text in [("test.jsonl", json.dumps(value)), ("test.json", json.dumps([value], indent=2))]
        ),
    ],
)
def test_every_form_of_gsm8k_aug(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    for path in (tmp_path, tmp_path / name):
        loaded = GSM8KAug(path=str(path)).load("test")
        assert [parts(problem) for problem in loaded.problems] == [AUG_PROBLEM]
        assert [step.text for step in loaded.problems[0].steps] == AUG_PROBLEM[1].split()
        assert loaded.notes == {"step whose result is rounded or wrong": 1}


def test_gsm8k_aug_as_parquet(tmp_path: Path) -> None:
    values = [{"question": "How many?", "steps": AUG_PROBLEM[1].split(), "answer": "1,240"}]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", values)
    assert [parts(problem) for problem in GSM8KAug(path=str(tmp_path)).load("test").problems] == [AUG_PROBLEM]


def test_gsm8k_aug_without_steps(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("How many?|| #### 5")
    loaded = GSM8KAug(path=str(tmp_path)).load("test")
    assert [parts(problem) for problem in loaded.problems] == [("How many?", "", "5")]
    assert loaded.notes == {"problem without a step": 1}


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("train.txt", "How many? <<1+1=2>> #### 2", 'no "||" after the question'),
        ("train.txt", "||<<1+1=2>> #### 2", "the question is empty"),
        ("train.txt", "How many?||<<1+1=2>> 2", 'no "####" before the final answer'),
        ("train.txt", "How many?||<<1+1=2>> ####", 'no answer behind "####"'),
        ("train.jsonl", '{"question": "q", "answer": "2"}', 'no "steps"'),
        ("train.jsonl", '{"question": "q", "steps": "<<1+1=2>>", "answer": "2"}', '"steps" is not a list of texts'),
        ("train.jsonl", '{"question": "q", "steps": [2], "answer": "2"}', '"steps" is not a list of texts'),
        ("train.jsonl", '{"question": "q", "steps": []}', 'no "answer"'),
        ("train.jsonl", '{"question": "q", "steps": [], "answer": ""}', 'no answer behind "####"'),
        ("train.jsonl", '{"question": "q", "steps": [], "answer": true}', '"answer" is a truth value, not a text'),
        ("train.jsonl", '{"steps": [], "answer": "2"}', 'no "question"'),
        ("train.jsonl", "{", "not valid JSON"),
    ],
)
def test_a_broken_line_of_gsm8k_aug_is_named(tmp_path: Path, name: str, line: str, says: str) -> None:
    good = AUG_LINE if name.endswith("txt") else json.dumps({"question": "q", "steps": ["<<1+1=2>>"], "answer": "2"})
    file = tmp_path / name
    file.write_text(f"{good}\n{line}\n{good}")
    assert message(GSM8KAug(path=str(tmp_path))).startswith(f"{file}:2: {says}")


# --- the yaml files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "source"), [("gsm8k", GSM8K), ("gsm8k_aug", GSM8KAug)])
def test_the_yaml_holds_every_field_with_its_default(name: str, source: type[WrittenSolutions]) -> None:
    values = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "configs" / "data" / f"{name}.yaml"))
    target = f"{source.__module__}.{source.__qualname__}"
    assert values == {"_target_": target, **vars(source())}


# --- the real data ---------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason="the real data are not in ../shared/data beside the repository"
)


def everything(source: WrittenSolutions) -> tuple[dict[Split, list[Problem]], Counter[str]]:
    loaded: dict[Split, LoadedSplit] = {split: source.load(split) for split in ALL_SPLITS}
    notes = sum((part.notes for part in loaded.values()), Counter[str]())
    return {split: list(part.problems) for split, part in loaded.items()}, notes


@real
def test_the_whole_of_gsm8k() -> None:
    splits, notes = everything(GSM8K(path=str(REAL_DATA / "gsm8k")))
    assert {split: len(problems) for split, problems in splits.items()} == {
        "train": 7473 - 500,
        "validation": 500,
        "test": 1319,
    }
    problems = [problem for part in splits.values() for problem in part]
    assert len({problem.question for problem in problems}) == 7473 + 1319  # so the splits are disjoint too
    steps = [step for problem in problems for step in problem.steps]
    assert len(steps) == 27_998
    assert all(step.is_correct() for step in steps)
    assert notes == {"problem without a step": 113}  # no malformed step, and every answer is a number
    assert {len(problem.steps) for problem in problems} == set(range(10))
    differs = sum(not same_number(p.steps[-1].result, p.answer) for p in problems if p.steps)
    assert differs == 470
    assert sum(problem.answer.startswith("-") for problem in problems) == 5


@real
@pytest.mark.parametrize("name", ["train", "test"])
def test_gsm8k_can_be_written_back(name: str) -> None:
    """Nothing of a row is lost: question, solution and answer can be put together again, but for commas and blanks."""
    file = REAL_DATA / "gsm8k" / f"{name}.jsonl"
    values = [json.loads(line) for line in file.read_bytes().decode().split("\n") if line]
    by_question = {problem.question: problem for problem in GSM8K(path=str(file)).load("test").problems}
    commas = 0
    for value in values:
        problem = by_question[value["question"]]
        head, mark, gold = value["answer"].rpartition("#### ")
        commas += "," in gold
        assert f"{problem.rationale}\n{mark}{problem.answer}" == head.rstrip() + "\n" + mark + gold.replace(",", "")
    assert commas == {"train": 79, "test": 14}[name]


@real
def test_quirks_of_gsm8k_by_place() -> None:
    train = GSM8K(path=str(REAL_DATA / "gsm8k" / "train.jsonl")).load("test").problems
    test = GSM8K(path=str(REAL_DATA / "gsm8k")).load("test").problems
    assert "\u2028" in train[2381].question
    assert [step.text for step in test[319].steps if step.expression == "3/4"] == ["<<3/4=3/4>>"]
    everything = [step for problem in [*train, *test] for step in problem.steps]
    assert sum(step.expression.startswith("+") for step in everything) == 16
    assert sum("//" in step.expression for step in everything) == 2
    assert any(step.text == "<<12=12>>" for step in everything)
    assert {".5", "7.00"} <= {step.result for step in everything}


@real
def test_the_whole_of_gsm8k_aug() -> None:
    splits, notes = everything(GSM8KAug(path=str(REAL_DATA / "gsm8k_aug")))
    assert {split: len(problems) for split, problems in splits.items()} == {
        "train": 3000,
        "validation": 500,
        "test": 1319,
    }
    found = sum(len(problem.steps) for part in splits.values() for problem in part)
    text = "".join(file.read_text(encoding="utf-8") for file in (REAL_DATA / "gsm8k_aug").glob("*.txt"))
    assert found + notes[MALFORMED] == text.count("<<") == text.count(">>")
    assert notes[MALFORMED] == 11
    assert notes["step whose result is rounded or wrong"] == 165
    assert notes["answer that is not a number"] == 0
    assert splits["train"][2488].answer == "2/5"
