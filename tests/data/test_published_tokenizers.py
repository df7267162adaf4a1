"""Published tokenizers against Hugging Face's own library: the same ids for every text, read and written."""

import base64
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from simcot_latent.data.patterns import LLAMA3_PATTERN, QWEN2_PATTERN
from simcot_latent.data.sources.arithmetic import Arithmetic
from simcot_latent.data.tokenizer import Tokenizer
from simcot_latent.errors import UserError
from simcot_latent.interop.published_tokenizers import LLAMA3_SPECIAL_TOKENS, read_tokenizer, write_tokenizer

Layout = tuple[Path, tokenizers.Tokenizer]
"""A folder that holds a tokenizer, and Hugging Face's own tokenizer with its ids."""

SMOLLM2_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
QWEN2_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_REGEX = inspect.signature(TikTokenConverter).parameters["pattern"].default

TOOL_CALL = "<tool_call>"
"""An added token of Qwen2's that is not flagged as special: the one thing that ours does not find in text."""

KINDS = ["gpt2", "llama3", "smollm2", "qwen2"]

# Characters that every side knows: the libraries' tables of Unicode are of different years.
known_characters = st.characters(exclude_categories=["Cs", "Cn"])
# What the patterns treat in a way of its own, so that it meets more often than in any text at all.
fragments = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u2028",
        "'s",
        "'LL",
        "'\u017f",
        "1",
        "42",
        "1234567",
        "½",
        "²",
        "٣",
        "a",
        " the",
    ]
    + [
        "É",
        "é",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "Å",
        "한",
        "\u1100\u1161",
        "中文",
        "😀",
        "👩\u200d👧",
        "\x00",
        "\x04",
        ".",
        "...",
        "!?\n",
    ]
    + ["<<", "=>>", "####", "$", "_", "-", "How many", " apples"]
)
texts = st.one_of(
    st.lists(fragments, max_size=12).map("".join),
    st.text(known_characters, max_size=20),
    st.lists(st.one_of(fragments, st.text(known_characters, max_size=2)), max_size=12).map("".join),
).filter(lambda text: TOOL_CALL not in text)  # Hypothesis draws strings of this file, too
thorough = settings(deadline=None, max_examples=400)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """English with numbers, and other scripts, so that tokens hold more than ASCII."""
    problems = Arithmetic(train_size=600, validation_size=1).load("train").problems
    others = [
        "Zoë's café, naïve Åse.",
        "Wie viele Äpfel hat Jürgen?",
        "中文句子。한국어 문장.",
        "x = 3²·½ ≈ 4,5 €",
        "😀😀 👍",
        "x:\n    y  =  3\n\n      4    z\n",
    ]
    return [f"{p.question}\n{p.rationale}\n\n" for p in problems] + others * 40


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train(kind: str, corpus: list[str]) -> tokenizers.Tokenizer:
    """A small tokenizer that is put together as the published ones are."""
    original = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    original.pre_tokenizer = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": lambda: split(LLAMA3_REGEX),
        "qwen2": lambda: split(PRETOKENIZE_REGEX),
        "smollm2": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }[kind]()
    if kind == "qwen2":
        original.normalizer = normalizers.NFC()
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=900,
        show_progress=False,
        # SmolLM2's special tokens come first, and the bytes that its text lacked are no tokens.
        special_tokens=SMOLLM2_SPECIAL_TOKENS if kind == "smollm2" else [],
        initial_alphabet=[] if kind == "smollm2" else pre_tokenizers.ByteLevel.alphabet(),
    )
    original.train_from_iterator(corpus, trainer)
    if kind == "gpt2":
        original.add_special_tokens(["<|endoftext|>"])
    if kind == "qwen2":
        original.add_special_tokens(QWEN2_SPECIAL_TOKENS)
        original.add_tokens([AddedToken(TOOL_CALL, normalized=False)])
    if kind == "llama3":
        original.add_special_tokens(list(LLAMA3_SPECIAL_TOKENS))
        bos = "<|begin_of_text|>"
        template = processors.TemplateProcessing(f"{bos} $A", None, [(bos, original.token_to_id(bos))])
        original.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return original


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> dict[str, Layout]:
    """A folder of each kind, as its publisher would have written it."""
    built: dict[str, Layout] = {}
    for kind in KINDS:
        original = train(kind, corpus)
        folder = tmp_path_factory.mktemp("published") / kind
        folder.mkdir()
        original.save(str(folder / "tokenizer.json"))
        original.encode_special_tokens = True  # text that spells one is ordinary text
        built[kind] = folder, original
    return built


@pytest.fixture(params=KINDS)
def layout(request: pytest.FixtureRequest, layouts: dict[str, Layout]) -> Layout:
    return layouts[request.param]


def ids_of(original: tokenizers.Tokenizer, text: str) -> list[int]:
    return original.encode(text, add_special_tokens=False).ids


def gsm8k_questions(shared: Path) -> list[str]:
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["question"] for line in lines if line]


def rewrite(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a folder's `tokenizer.json`, some of its components replaced."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (to / "tokenizer.json").write_text(json.dumps(content | changes), encoding="utf-8")
    return to


# Reading tokenizer.json


def test_patterns_are_the_publishers() -> None:
    assert (LLAMA3_PATTERN, QWEN2_PATTERN) == (LLAMA3_REGEX, PRETOKENIZE_REGEX)


def test_read_ids_are_the_originals(layout: Layout) -> None:
    folder, original = layout
    ours = read_tokenizer(folder)

    @thorough
    @given(texts)
    def check(text: str) -> None:
        assert ours.encode(text) == ids_of(original, text)

    check()


def test_read_ids_are_the_originals_on_gsm8k(layout: Layout, shared: Path) -> None:
    folder, original = layout
    ours = read_tokenizer(folder)
    for question in gsm8k_questions(shared):
        assert ours.encode(question) == ids_of(original, question)


def test_read_round_trips(layout: Layout) -> None:
    ours = read_tokenizer(layout[0])

    @thorough
    @given(texts)
    def check(text: str) -> None:
        kept = ours.normalised(text).encode().translate(None, ours.missing_bytes)
        assert ours.decode(ours.encode(text)) == kept.decode(errors="replace")

    check()


@pytest.mark.parametrize(("kind", "lacks"), [("gpt2", False), ("llama3", False), ("qwen2", False), ("smollm2", True)])
def test_vocabulary_and_special_tokens(layouts: dict[str, Layout], kind: str, lacks: bool) -> None:
    folder, original = layouts[kind]
    ours = read_tokenizer(folder)
    assert ours.name == kind
    assert ours.n_vocab == original.get_vocab_size()
    assert bool(ours.missing_bytes) == lacks
    assert ours.normal_form == ("NFC" if kind == "qwen2" else None)
    for token, i in original.get_vocab(with_added_tokens=True).items():
        if i in original.get_added_tokens_decoder():
            assert ours.special_tokens[token] == i
            assert ours.decode([i]) == ""
        else:
            assert ours.decode([i]) == original.decode([i])


def test_digits_are_cut_off_before_the_blanks_are(layouts: dict[str, Layout]) -> None:
    folder, original = layouts["smollm2"]
    ours = read_tokenizer(folder)
    for text in ["a  12  b", "a 1 ", "\n\n 3x", " 12 's", "1's", "  \u0663\u00bd\u2167", "x   ", "1  ", "1  .5"]:
        assert ours.encode(text) == ids_of(original, text)
    assert [ours.decode([i]) for i in ours.encode("ab  12 ")][-4:] == ["  ", "1", "2", " "]


def test_missing_bytes_are_left_out_and_what_is_beside_them_may_join(tmp_path: Path) -> None:
    original = tokenizers.Tokenizer(
        models.BPE({"-": 0, "--": 1, "Ã": 2, "a": 3, "Ġ": 4, "Ġ-": 5}, [("-", "-"), ("Ġ", "-")])
    )
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path)
    for text in ["-~-", "-~~-~-", "é", "~", "a~a", "ab-a", " ~-~-", "-~é~-", "", "~ -"]:
        assert ours.encode(text) == ids_of(original, text)
    assert ours.encode("-~-") == [1]
    ours.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert loaded == ours
    assert loaded.encode("-~-") == [1]
    assert ours.filled_up_to(10).encode("-~-") == [1]


def test_spans_are_found_around_missing_bytes_and_composed_characters(layouts: dict[str, Layout]) -> None:
    step = "<<3+4=7>>"
    for kind, text in [
        ("qwen2", f"cafe\u0301 {step} n\u0303 A\u030a{step}\u1100\u1161"),
        ("smollm2", f"\x04~ ü\U000e0041 {step}\x04{step}"),
    ]:
        ours = read_tokenizer(layouts[kind][0])
        starts = [i for i in range(len(text)) if text.startswith(step, i)]
        ids, in_span = ours.encode_with_spans(text, [(start, start + len(step)) for start in starts])
        assert ids == ours.encode(text)
        assert len(starts) == 2
        marked = "".join(ours.decode([i]) for i, inside in zip(ids, in_span, strict=True) if inside)
        assert marked.replace(" ", "") == step * 2


def test_spans_cover_the_same_tokens_as_without_missing_bytes(layouts: dict[str, Layout]) -> None:
    ours = read_tokenizer(layouts["smollm2"][0])
    assert 4 in ours.missing_bytes

    @thorough
    @given(st.text("ab1 <+é\x04", max_size=15), st.data())
    def check(text: str, data: st.DataObject) -> None:
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        ids, in_span = ours.encode_with_spans(text, [(start, end)])
        # The characters of the text from a token's first to its last.
        kept = [i for i, character in enumerate(text) if character != "\x04"]
        spans = [(kept[first], kept[last - 1] + 1) for first, last in ours.token_spans(ids)]
        assert in_span == [max(start, first) < min(end, last) for first, last in spans]

    check()


def test_ids_of_no_token_stand_for_nothing(layouts: dict[str, Layout], tmp_path: Path) -> None:
    folder, original = layouts["llama3"]
    n_vocab = original.get_vocab_size()
    last = {"id": n_vocab + 2, "content": "<|last|>", "special": True}
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ours = read_tokenizer(rewrite(folder, tmp_path, added_tokens=[*added, last]))
    assert ours.n_vocab == n_vocab + 3
    assert [*ours.special_tokens.items()][-3:] == [
        (f"<|unused_{n_vocab}|>", n_vocab),
        (f"<|unused_{n_vocab + 1}|>", n_vocab + 1),
        ("<|last|>", n_vocab + 2),
    ]
    assert ours.ranks == read_tokenizer(folder).ranks


def test_spelled_special_tokens_are_plain_text(layout: Layout) -> None:
    ours = read_tokenizer(layout[0])
    for token in ours.special_tokens:
        ids = ours.encode(f"a{token}b")
        assert not set(ids) & set(ours.special_tokens.values())


# Roles


def test_roles_come_from_the_configuration(layouts: dict[str, Layout], tmp_path: Path) -> None:
    folder = rewrite(layouts["smollm2"][0], tmp_path)

    def roles(**files: dict[str, Any]) -> dict[str, str]:
        for file in ("config", "generation_config", "tokenizer_config"):
            (folder / f"{file}.json").unlink(missing_ok=True)
            if file in files:
                (folder / f"{file}.json").write_text(json.dumps(files[file]))
        return read_tokenizer(folder).roles

    end, pad = {"end": "<|im_end|>", "pad": "<|im_end|>"}, {"end": "<|im_end|>", "pad": "<|endoftext|>"}
    assert roles() == {}
    assert roles(tokenizer_config={"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}) == end
    assert roles(tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}) == pad
    assert roles(config={"eos_token_id": 2, "pad_token_id": 0}, tokenizer_config={"eos_token": "<repo_name>"}) == pad
    assert roles(generation_config={"eos_token_id": [2, 0]}, config={"eos_token_id": 3, "pad_token_id": None}) == end
    # Of several, as Llama 3 has, the one that ends an answer.
    assert roles(generation_config={"eos_token_id": [0, 2]}, tokenizer_config={"eos_token": "<|im_end|>"}) == end
    # An id that is no special token is a class's default that nobody has changed.
    assert roles(config={"eos_token_id": 70}, tokenizer_config={"eos_token": "<|im_end|>"}) == end


def test_bos_is_what_the_original_begins_texts_with(layouts: dict[str, Layout], tmp_path: Path) -> None:
    folder, original = layouts["llama3"]
    ours = read_tokenizer(folder)
    assert [ours.bos_id, *ours.encode("a 1")] == original.encode("a 1").ids
    for kind in ("gpt2", "smollm2", "qwen2"):
        assert read_tokenizer(layouts[kind][0]).bos_id is None
    template = json.loads((folder / "tokenizer.json").read_text())["post_processor"]["processors"][1]
    assert read_tokenizer(rewrite(folder, tmp_path, post_processor=template)) == ours


# Other layouts


def test_folders_that_transformers_writes(layout: Layout, tmp_path: Path) -> None:
    original = layout[1]
    special = next(iter(original.get_added_tokens_decoder().values())).content
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=original, eos_token=special)
    fast.save_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    assert ours.encode("2  apples + 3é") == fast.encode("2  apples + 3é", add_special_tokens=False)
    assert ours.end_id == ours.pad_id == fast.eos_token_id


def test_vocab_and_merges(layouts: dict[str, Layout], tmp_path: Path) -> None:
    folder, original = layouts["gpt2"]
    original.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = len(vocab)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    ours = read_tokenizer(tmp_path)
    assert ours.roles == {"end": "<|endoftext|>", "pad": "<|endoftext|>"}
    assert (ours.end_id, ours.n_vocab) == (original.token_to_id("<|endoftext|>"), original.get_vocab_size())
    assert (ours.ranks, ours.pattern) == (read_tokenizer(folder).ranks, read_tokenizer(folder).pattern)


@pytest.fixture
def llama3_ranks(layouts: dict[str, Layout], tmp_path: Path) -> Path:
    """A folder with Llama 3's kind of `tokenizer.model`, two of whose tokens BPE does not arrive at."""
    ranks = [*read_tokenizer(layouts["llama3"][0]).ranks, b" unheard", b"zq-zq"]
    folder = tmp_path / "original"
    folder.mkdir()
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def test_tiktoken_ranks_of_llama3(llama3_ranks: Path, tmp_path: Path) -> None:
    ours = read_tokenizer(llama3_ranks)
    n_ranks = len(ours.ranks)
    assert ours.n_vocab == n_ranks + 256
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/tokenizer.json, less 128000
    for token, i in {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|reserved_special_token_3|>": 5,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|reserved_special_token_4|>": 8,
        "<|eot_id|>": 9,
        "<|reserved_special_token_5|>": 10,
        "<|reserved_special_token_250|>": 255,
    }.items():
        assert ours.special_tokens[token] == n_ranks + i
    assert ours.roles == {"bos": "<|begin_of_text|>", "end": "<|end_of_text|>", "pad": "<|end_of_text|>"}
    assert ours.decode([ours.encode("it unheard")[-1]]) == " unheard"

    # The converter of `transformers` writes every pair that makes a token as a merge.
    converter = TikTokenConverter(
        str(llama3_ranks / "tokenizer.model"), extra_special_tokens=list(LLAMA3_SPECIAL_TOKENS)
    )
    original = converter.converted()
    original.encode_special_tokens = True
    converted = tmp_path / "converted"
    converted.mkdir()
    original.save(str(converted / "tokenizer.json"))
    again = read_tokenizer(converted)
    assert (again.ranks, again.special_tokens, again.pattern) == (ours.ranks, ours.special_tokens, ours.pattern)

    @thorough
    @given(texts)
    def check(text: str) -> None:
        assert ours.encode(text) == ids_of(original, text)

    check()


# Writing


@pytest.fixture(params=[*KINDS, "llama3 ranks", "default", "tiktoken gpt2"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in KINDS:
        return read_tokenizer(request.getfixturevalue("layouts")[request.param][0])
    if request.param == "llama3 ranks":
        return read_tokenizer(request.getfixturevalue("llama3_ranks"))
    return request.getfixturevalue("tokenizer" if request.param == "default" else "gpt2")


def test_transformers_loads_what_is_written(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(any_tokenizer, tmp_path)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    spelling = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)

    @settings(deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert spelling.encode(text, add_special_tokens=False) == any_tokenizer.encode(text)

    check()
    for token in list(any_tokenizer.special_tokens)[:5]:
        assert spelling.encode(f"a{token}", add_special_tokens=False) == any_tokenizer.encode(f"a{token}")
        assert original.encode(f"a{token}", add_special_tokens=False)[1:] == [any_tokenizer.special_tokens[token]]
    bos = [] if any_tokenizer.bos_id is None else [any_tokenizer.bos_id]
    assert original.encode("a 1") == bos + any_tokenizer.encode("a 1")
    assert len(original) == any_tokenizer.n_vocab
    for ours, theirs in (
        ("end", original.eos_token_id),
        ("pad", original.pad_token_id),
        ("bos", original.bos_token_id),
    ):
        assert theirs == (any_tokenizer.id_of(ours) if ours in any_tokenizer.roles else None)
    for i in range(any_tokenizer.n_vocab):
        assert original.decode([i], skip_special_tokens=True) == any_tokenizer.decode([i])


def test_what_is_written_is_read_as_it_was(any_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(any_tokenizer, tmp_path)
    again = read_tokenizer(tmp_path)
    for attribute in ("ranks", "pattern", "special_tokens", "normal_form", "missing_bytes"):
        assert getattr(again, attribute) == getattr(any_tokenizer, attribute)
    assert again.roles == {role: token for role, token in any_tokenizer.roles.items() if role in ("end", "pad", "bos")}


def test_tokens_that_later_tokens_make_are_written_with_what_makes_them(tmp_path: Path) -> None:
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), b"abc", b"ab", b"xyz"])}
    ours = Tokenizer("odd", r"[\s\S]+", ranks, {"<|end|>": 259}, {"end": "<|end|>"})
    write_tokenizer(ours, tmp_path)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["abc", "zabcab", "xyz", "xyzz"]:  # 257 joins a and b, then 256 both and c; 258 is a whole piece only
        assert original.encode(text) == ours.encode(text)
    assert ours.encode("zabcab") == [ord("z"), 256, 257]
    assert read_tokenizer(tmp_path).ranks == ranks


def test_written_gpt2_is_gpt2_on_gsm8k(gpt2: Tokenizer, tmp_path: Path, shared: Path) -> None:
    write_tokenizer(gpt2, tmp_path)
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoding = tiktoken.get_encoding("gpt2")
    questions = gsm8k_questions(shared)
    assert original(questions)["input_ids"] == [encoding.encode_ordinary(question) for question in questions]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen2", "nanochat"])
def test_the_class_of_the_model_beside_it_does_not_matter(
    model_type: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": tokenizer.n_vocab}))
    original = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["12  apples", "<<3+4=7>>7\n\n#### 7 é"]:
        assert original.encode(text) == tokenizer.encode(text)


# Errors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre_tokenizer": None}, "pre_tokenizer null is not supported; supported: ByteLevel"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, 'pre_tokenizer {"type": "Metaspace"'),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, 'pre_tokenizer {"type": "ByteLevel"'),
        ({"pre_tokenizer": {"type": "Sequence"}}, 'pre_tokenizer {"type": "Sequence"}'),
        ({"normalizer": {"type": "Lowercase"}}, 'normalizer {"type": "Lowercase"} is not supported; supported: null'),
        ({"post_processor": {"type": "TemplateProcessing", "single": []}}, "post_processor"),
        ({"post_processor": {"type": "BertProcessing"}}, 'post_processor {"type": "BertProcessing"} is not supported'),
        ({"added_tokens": [{"id": 9, "content": "  ", "special": False}]}, "added_tokens"),
        ({"model": {"type": "Unigram", "vocab": []}}, "holds no BPE of Hugging Face's library"),
        ({"model": {"type": "WordPiece", "vocab": {}, "merges": []}}, 'model.type "WordPiece"'),
        ({"model": {"vocab": {"a": 0}, "merges": [], "dropout": 0.5}}, "model.dropout 0.5 is not supported"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "_"}}, "model.end_of_word_suffix"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "unk_token": "a"}}, "model.unk_token"),
        ({"model": {"vocab": {"a": "0"}, "merges": []}}, "the id of 'a' is no number"),
        ({"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}, "merge 'a b' is not of tokens"),
        ({"model": {"vocab": {"a": 0}, "merges": [1]}}, "model.merges holds 1"),
        ({"model": {"vocab": {"▁a": 0}, "merges": []}}, "its tokens are not byte-level: '▁' stands for no byte"),
        ({"model": {"vocab": {"a": 0, "aa": 2, "b": 1, "ab": 3}, "merges": ["a b", "a a"]}}, "not in the order of ids"),
        # What joins b and c first can never join a and b: tiktoken would take a and bc.
        (
            {"model": {"vocab": {token: i for i, token in enumerate(["a", "b", "c", "bc", "ab", "abc"])},
                       "merges": ["b c", "a b", "ab c"]}},
            "make 'abc' in another way than tiktoken",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    layouts: dict[str, Layout], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    plain = {"added_tokens": [], "post_processor": None} | changes
    with pytest.raises(UserError) as error:
        read_tokenizer(rewrite(layouts["gpt2"][0], tmp_path, **plain))
    assert says in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"\p{L}+|\s+", "leaves out text"),
        (r"[^\p{N}]+|\p{N}{1,3}+", r"a \+ after braces"),
        ("(", "not a regular expression"),
    ],
)
def test_patterns_that_tiktoken_takes_otherwise_are_named(
    layouts: dict[str, Layout], tmp_path: Path, pattern: str, says: str
) -> None:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    with pytest.raises(UserError, match=says) as error:
        read_tokenizer(
            rewrite(layouts["gpt2"][0], tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        )
    assert str(error.value).startswith(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no tokenizer; it needs tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json: not JSON"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: must hold a JSON object"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json: not UTF-8 text (byte 0)"),
        ({"tokenizer.model": b"\n\x0e\n\x05<unk>\x15"}, "tokenizer.model, line 1: not a token in base64"),
        ({"tokenizer.model": "AA== 0\n"}, "tokenizer.model: ranks must hold each of the 256 single bytes"),
        ({"vocab.json": '{"<|endoftext|>": 0}'}, "merges.txt: no such file"),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, "vocab.json: ids must be 0 to 0, each once"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "vocab.json: lacks <|endoftext|>"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
            "vocab.json: only GPT-2's is read, not that of Qwen2Tokenizer; give its tokenizer.json",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_named(tmp_path: Path, files: dict[str, str | bytes], says: str) -> None:
    for file, content in files.items():
        (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path)
    assert says in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_pattern_that_others_take_otherwise_is_not_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer("odd", r"\p{N}{1,3}+|[^\p{N}]+", tokenizer.ranks, tokenizer.special_tokens)
    with pytest.raises(UserError, match=r"tokenizer odd: .* \+ after braces"):
        write_tokenizer(other, tmp_path)
