"""Tokenizers: round trips, spans, special tokens, saving; the BPE trainer against a naive one on top of tiktoken."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import SPECIAL_TOKENS, Tokenizer, default_tokenizer, gpt2_tokenizer, read_ranks
from simcot_latent.data.train_tokenizer import MARKS, count_pieces, main, train_bpe, weigh_equally
from simcot_latent.errors import UserError

TIKTOKEN_CACHE = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiktoken_cache"

DEFAULT = default_tokenizer()
no_deadline = settings(deadline=None)  # a busy machine is not a failure

# Text near the data's, so that marks, digits and multi-byte characters meet more often than in any text at all.
data_like_text = st.lists(
    st.sampled_from(["<<", ">>", "####", " ", "\n", "48", "/2", ")=", "é", "😀", "½", "≈", "Sam", "<|bot|>", "\u2028"])
).map("".join)
texts = st.one_of(st.text(), data_like_text)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    if not TIKTOKEN_CACHE.is_dir():
        pytest.skip(f"no GPT-2 files for tiktoken: {TIKTOKEN_CACHE} is not there")
    cache = tmp_path_factory.mktemp("tiktoken_cache")  # a copy: tiktoken deletes files that it finds wrong
    for file in TIKTOKEN_CACHE.iterdir():
        shutil.copyfile(file, cache / file.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        yield gpt2_tokenizer()


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def marked(tokenizer: Tokenizer, text: str, *steps: str) -> list[str]:
    """The tokens of `text` that lie in one of `steps`, each as its own text."""
    spans = [(text.index(step), text.index(step) + len(step)) for step in steps]
    ids, in_span = tokenizer.encode_with_spans(text, spans)
    return [tokenizer.decode([i]) for i, inside in zip(ids, in_span, strict=True) if inside]


# Encoding and decoding


def test_default_vocabulary() -> None:
    assert DEFAULT.n_vocab == 2048
    assert [DEFAULT.bot_id, DEFAULT.eot_id, DEFAULT.end_id, DEFAULT.pad_id] == [2044, 2045, 2046, 2047]
    assert DEFAULT.encoding.n_vocab == DEFAULT.n_vocab
    for i in range(DEFAULT.n_vocab):
        assert isinstance(DEFAULT.decode([i]), str)


def test_each_default_token_joins_two_earlier_ones() -> None:
    ranks = DEFAULT.encoding._mergeable_ranks
    for token, rank in ranks.items():
        if len(token) == 1:
            assert token == bytes([rank])
        else:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            assert any(ranks.get(a, rank) < rank and ranks.get(b, rank) < rank for a, b in splits), token


@no_deadline
@given(texts)
def test_round_trip(text: str) -> None:
    assert DEFAULT.decode(DEFAULT.encode(text)) == text


def test_round_trip_gpt2(gpt2: Tokenizer) -> None:
    @no_deadline
    @given(texts)
    def check(text: str) -> None:
        assert gpt2.decode(gpt2.encode(text)) == text

    check()


@no_deadline
@given(st.integers(0, 10**12), st.sampled_from(["", " ", "$", "a", " a", "-", "\n", "<<"]))
def test_digits_are_single_wherever_the_number_stands(number: int, before: str) -> None:
    assert DEFAULT.encode(f"{before}{number}") == DEFAULT.encode(before) + [ord(digit) for digit in str(number)]


@pytest.mark.parametrize("around", ["{}", "a {} b", " = ${}24", "\n{}\n", "({})"])
@pytest.mark.parametrize(
    ("step", "tokens"),
    [
        ("<<48/2=24>>", ["<<", *"48/2=24", ">>"]),
        ("<<(3+4)*-2=-14>>", ["<<", *"(3+4)*-2=-14", ">>"]),
        ("<<5 * .5 = 2.50>>", ["<<", *"5 * .5 = 2.50", ">>"]),
        ("<<7//2=3>>", ["<<", *"7//2=3", ">>"]),
        ("####", ["####"]),
    ],
)
def test_step_pieces_are_the_same_in_any_surroundings(around: str, step: str, tokens: list[str]) -> None:
    before, after = around.split("{}")
    assert pieces(DEFAULT, around.format(step)) == pieces(DEFAULT, before) + tokens + pieces(DEFAULT, after)


def test_words_and_blanks() -> None:
    assert pieces(DEFAULT, "He has,  then\n\nsold half") == [
        "He",
        " has",
        ",",
        " ",
        " then",
        "\n",
        "\n",
        "s",
        "old",
        " half",
    ]


def test_words_of_the_embedded_data_are_single_tokens() -> None:
    problems = Arithmetic(train_size=1, validation_size=300).load("validation").problems
    words = [word for p in problems for word in regex.findall(r" ?\p{L}+", f"{p.question}\n{p.rationale}")]
    assert sum(len(DEFAULT.encode(word)) for word in words) < 1.01 * len(words)


def test_marks_are_tokens_of_every_trained_file() -> None:
    ranks = train_bpe({"abab": 3}, 256 + len(MARKS) + 1)
    assert list(ranks)[256:] == [*MARKS, b"ab"]


@pytest.mark.parametrize("spelled", [*SPECIAL_TOKENS, "<|endoftext|>"])
def test_spelled_special_tokens_are_plain_text(spelled: str, gpt2: Tokenizer) -> None:
    for tokenizer in DEFAULT, gpt2:
        ids = tokenizer.encode(f"a{spelled}b")
        special_ids = set(tokenizer.encoding._special_tokens.values())
        assert special_ids
        assert not special_ids & set(ids)
        assert tokenizer.decode(ids) == f"a{spelled}b"


def test_decode_drops_special_tokens(gpt2: Tokenizer) -> None:
    for tokenizer in DEFAULT, gpt2:
        special_ids = tokenizer.encoding._special_tokens.values()
        ids = [i for pair in zip(tokenizer.encode("é=1"), special_ids, strict=False) for i in pair]
        assert tokenizer.decode([*special_ids, *ids]) == tokenizer.decode(i for i in ids if i not in special_ids)


def test_decode_replaces_what_is_not_utf8_and_refuses_what_is_no_id() -> None:
    assert DEFAULT.decode([0xFF, ord("a"), 0xF0, 0x9F]) == "\ufffda\ufffd"
    for wrong in (-100, -1, 2048):
        with pytest.raises(IndexError, match=f"{wrong} is not in 0 to 2047"):
            DEFAULT.decode([5, wrong])


def test_lone_surrogates_become_replacement_characters() -> None:
    text = "\ud83d\udc00 <<1+1=2>>"  # two code points that are not a pair once in a str
    assert DEFAULT.decode(DEFAULT.encode(text)) == "\ufffd\ufffd <<1+1=2>>"
    assert marked(DEFAULT, text, "<<1+1=2>>") == ["<<", *"1+1=2", ">>"]


@pytest.mark.parametrize("unit", ["a", " ", "é", "5", "<"])
def test_very_long_runs_are_encoded(unit: str) -> None:
    text = unit * 300_000 + "x"
    assert DEFAULT.decode(DEFAULT.encode(text)) == text


def test_gpt2_is_tiktokens_with_our_special_tokens_last(gpt2: Tokenizer) -> None:
    assert (gpt2.n_vocab, gpt2.bot_id, gpt2.eot_id, gpt2.end_id, gpt2.pad_id) == (50261, 50257, 50258, 50259, 50260)
    text = "Sam sold <<3*(2)=6>>6 clips."
    assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode(text)


def test_gpt2_without_its_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(path: str) -> bytes:
        raise OSError(f"no route to {path}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", no_network)
    with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*tokenizer=default") as error:
        gpt2_tokenizer()
    assert "\n" not in str(error.value)


# Spans


def test_spans_after_multi_byte_characters() -> None:
    text = "Zoë 😀 pays 3€: ½ ≈ 3 * 2 = <<3*2=6>>6 日本 <<6/2=3>>3."
    assert marked(DEFAULT, text, "<<3*2=6>>", "<<6/2=3>>") == ["<<", *"3*2=6", ">>", "<<", *"6/2=3", ">>"]


def test_spans_with_fused_gpt2_tokens(gpt2: Tokenizer) -> None:
    text = "😀 é = <<3*(2)=6>>6 and $<<6/2=3>>3."
    first, second = [" <<", "3", "*", "(", "2", ")=", "6", ">>"], ["<<", "6", "/", "2", "=", "3", ">>"]
    assert marked(gpt2, text, "<<3*(2)=6>>", "<<6/2=3>>") == first + second
    # Half of a fused token in the span is enough, and the neighbour of a span is out of it.
    assert marked(gpt2, "(2)=6", ")") == marked(gpt2, "(2)=6", "=") == [")="]
    assert marked(gpt2, "(2)=6", "2") == ["2"]


def test_part_of_a_character_is_in_its_span(gpt2: Tokenizer) -> None:
    text = "a🧮b"
    ids, in_span = gpt2.encode_with_spans(text, [(1, 2)])
    assert len(ids) > 3
    assert in_span == [False] + [True] * (len(ids) - 2) + [False]
    assert gpt2.token_spans(ids) == [(0, 1)] + [(1, 2)] * (len(ids) - 2) + [(2, 3)]


def test_empty_spans_hold_nothing_and_spans_outside_are_refused() -> None:
    assert DEFAULT.encode_with_spans("", [(0, 0)]) == ([], [])
    assert DEFAULT.encode_with_spans("12", [(1, 1)]) == ([ord("1"), ord("2")], [False, False])
    for span in [(0, 3), (-1, 1), (2, 1)]:
        with pytest.raises(ValueError, match="does not lie in a text of 2 characters"):
            DEFAULT.encode_with_spans("12", [span])


def test_token_spans_of_special_tokens_are_empty() -> None:
    ids = [DEFAULT.bot_id, *DEFAULT.encode("1é"), DEFAULT.eot_id, ord("2"), DEFAULT.pad_id]
    spans = DEFAULT.token_spans(ids)
    assert spans[0] == (0, 0)
    assert spans[-3:] == [(2, 2), (2, 3), (3, 3)]


@no_deadline
@given(texts)
def test_token_spans_start_where_tiktoken_says(text: str) -> None:
    ids = DEFAULT.encode(text)
    decoded, starts = DEFAULT.encoding.decode_with_offsets(ids)
    spans = DEFAULT.token_spans(ids)
    assert decoded == text
    assert [start for start, _ in spans] == starts
    for (_, end), (start, _) in pairwise(spans):
        assert start in (end, end - 1)  # neighbours touch, or share a character
    assert not spans or spans[-1][1] == len(text)


@no_deadline
@given(st.lists(st.integers(0, 2047)))
def test_token_spans_cover_the_decoded_text_of_any_ids(ids: list[int]) -> None:
    text, spans = DEFAULT.decode(ids), DEFAULT.token_spans(ids)
    assert {i for start, end in spans for i in range(start, end)} == set(range(len(text)))
    assert spans == sorted(spans)
    for i, (start, end) in zip(ids, spans, strict=True):
        if "\ufffd" not in DEFAULT.decode([i]):  # a token of whole characters is found again in its span
            assert text[start:end] == DEFAULT.decode([i])


@no_deadline
@given(texts, st.data())
def test_marked_tokens_are_those_whose_characters_meet_a_span(text: str, data: st.DataObject) -> None:
    offsets = st.integers(0, len(text))
    drawn = data.draw(st.lists(st.tuples(offsets, offsets).map(sorted), max_size=3))
    spans = [(start, end) for start, end in drawn]
    ids, in_span = DEFAULT.encode_with_spans(text, spans)
    assert ids == DEFAULT.encode(text)
    assert in_span == [
        any(max(start, first) < min(end, last) for start, end in spans) for first, last in DEFAULT.token_spans(ids)
    ]


# Saving and loading


def test_saved_tokenizers_load_to_the_same_ids(tmp_path: Path, gpt2: Tokenizer) -> None:
    text = "Zoë 😀 had 3 * 2 = <<3*2=6>>6 <|bot|> clips.\n#### 6"
    for tokenizer in DEFAULT, gpt2:
        folder = tmp_path / "checkpoint" / tokenizer.name
        tokenizer.save(folder)
        assert sorted(file.name for file in folder.iterdir()) == ["ranks.tiktoken", "tokenizer.json"]
        loaded = Tokenizer.load(folder)
        assert (loaded.name, loaded.n_vocab) == (tokenizer.name, tokenizer.n_vocab)
        for special in ("bot_id", "eot_id", "end_id", "pad_id"):
            assert getattr(loaded, special) == getattr(tokenizer, special)
        assert loaded.encode(text) == tokenizer.encode(text)
        loaded.save(tmp_path / "again")
        for file in folder.iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "tokenizer.json: not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json: must hold a JSON object"),
        ("tokenizer.json", {"special_tokens": {"<|bot|>": "2044"}}, "tokenizer.json: needs name and pattern"),
        ("tokenizer.json", {"special_tokens": {"<|bot|>": 2044}}, "special tokens lack <|eot|>, <|end|>, <|pad|>"),
        ("tokenizer.json", {"pattern": "("}, "pattern is not a regular expression"),
        ("ranks.tiktoken", None, "ranks.tiktoken: no such file"),
        ("ranks.tiktoken", "", "ranks must hold each of the 256 single bytes"),
        ("ranks.tiktoken", "AA== 0\n?? 1\n", "ranks.tiktoken, line 2: not a token in base64"),
        ("ranks.tiktoken", "AA== 0\nAA== 1\n", "ranks.tiktoken, line 2: the token is there twice"),
    ],
)
def test_broken_folders_are_named(
    tmp_path: Path, file: str, content: str | dict[str, object] | None, says: str
) -> None:
    DEFAULT.save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    elif isinstance(content, dict):
        (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | content))
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        Tokenizer.load(tmp_path)
    assert says in str(error.value)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_ranks_file_is_noticed(tmp_path: Path) -> None:
    DEFAULT.save(tmp_path)
    lines = (tmp_path / "ranks.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "ranks.tiktoken").write_bytes(b"".join(lines[:-10]))
    with pytest.raises(UserError, match=r"ranks.tiktoken: ids .* must be 0 to 2037"):
        Tokenizer.load(tmp_path)


# Training


def naive_bpe(counts: Mapping[str, int], n_ranks: int) -> dict[bytes, int]:
    """All pairs counted anew for every token, over pieces that tiktoken itself has encoded with the ranks so far."""
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *MARKS])}
    while len(ranks) < n_ranks:
        encoding = tiktoken.Encoding("naive", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
        pairs: Counter[bytes] = Counter()
        for piece, count in counts.items():
            tokens = encoding.decode_tokens_bytes(encoding.encode_ordinary(piece))
            for left, right in pairwise(tokens):
                pairs[left + right] += count
        ranks[min(pairs, key=lambda pair: (-pairs[pair], pair))] = len(ranks)
    return ranks


def test_trainer_agrees_with_a_naive_one_on_text() -> None:
    text = "banana bandana cabana abracadabra aaaa aaaaaaa << >> #### ananas naïve é éé 日本日本 the then three trees"
    counts = Counter({piece: n for n, piece in enumerate(text.split(), start=1)})
    n_ranks = 256 + len(MARKS) + 40
    assert list(train_bpe(counts, n_ranks).items()) == list(naive_bpe(counts, n_ranks).items())


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc<#", min_size=1, max_size=9), st.integers(1, 4), min_size=1, max_size=6))
def test_trainer_agrees_with_a_naive_one_on_anything(counts: dict[str, int]) -> None:
    n_ranks = 256 + len(MARKS)
    while True:
        try:
            trained = train_bpe(counts, n_ranks + 1)
        except UserError:
            break
        n_ranks += 1
        if n_ranks == 256 + len(MARKS) + 12:
            break
        assert len(trained) == n_ranks
    assert list(train_bpe(counts, n_ranks).items()) == list(naive_bpe(counts, n_ranks).items())


def test_trainer_says_when_the_text_or_the_vocabulary_is_too_small() -> None:
    with pytest.raises(UserError, match="the text is too small: it gives 261 tokens, not 300"):
        train_bpe({"ab": 1}, 300)
    with pytest.raises(UserError, match="100 tokens are too few"):
        train_bpe({"ab": 1}, 100)


def test_pieces_are_counted_as_they_are_encoded() -> None:
    assert count_pieces(["Sam\ud800 <<1", " Sam"]) == {"Sam": 1, "\ufffd": 1, " ": 1, "<<": 1, "1": 1, " Sam": 1}


def test_corpora_count_equally() -> None:
    counts = weigh_equally([{"a": 1, "b": 2}, {"b": 4, "c": 1}])
    assert counts == {"a": 5, "b": 10 + 12, "c": 3}


def test_command_writes_a_file_that_the_tokenizer_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Sam sold some clips, then Sam sold more clips.\n" * 3, encoding="utf-8")
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"How many\u2028clips are {n}?", "answer": f"<<{n}={n}>>{n}\n#### {n}"} for n in range(20)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    (folder / "test.jsonl").write_text("must not be read", encoding="utf-8")
    command = ["--text", str(text), "--gsm8k", str(folder), "--arithmetic", "20", "--vocab-size", "300", "--out"]
    for out in ("a.tiktoken", "b.tiktoken"):
        assert main([*command, str(tmp_path / out)]) == 0
    assert "gsm8k: 18 texts" in capsys.readouterr().out
    assert (tmp_path / "a.tiktoken").read_bytes() == (tmp_path / "b.tiktoken").read_bytes()
    tokenizer = default_tokenizer(tmp_path / "a.tiktoken")
    assert (tokenizer.name, tokenizer.n_vocab) == ("a", 300)
    assert " clips" in pieces(tokenizer, "more clips")
    assert read_ranks(tmp_path / "a.tiktoken") == tokenizer.encoding._mergeable_ranks


@pytest.mark.parametrize("equals", [False, True])
def test_command_knows_the_home_folder(equals: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bash leaves `~` alone in quotes and behind `--out=`."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "text.txt").write_text("Sam sold some clips, then Sam sold more clips.\n" * 3, encoding="utf-8")
    given = {"--out": "~/tok.tiktoken", "--text": "~/text.txt", "--vocab-size": "280"}
    arguments = [f"{key}={value}" for key, value in given.items()] if equals else [*sum(given.items(), ())]
    assert main(arguments) == 0
    assert {entry.name for entry in home.iterdir()} == {"tok.tiktoken", "text.txt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to train on"),
        (["--arithmetic", "9", "--out", "~nobody-of-that-name/x"], "--out=~nobody-of-that-name/x: no home folder"),
        (["--text", "none.txt"], "none.txt: cannot read"),
        (["--text", "empty.txt"], "no text in empty.txt"),
        (["--text", "latin1.txt"], "latin1.txt: not UTF-8 text (byte 2)"),
        (["--gsm8k", "."], "train.jsonl:2: "),
    ],
)
def test_command_ends_in_one_line_on_bad_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes(b"Zo\xeb")
    Path("train.jsonl").write_text('{"question": "a", "answer": "b\\n#### 1"}\n{"question": "a"}\n')
    assert main(["--out", "out.tiktoken", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out.tiktoken").exists()
