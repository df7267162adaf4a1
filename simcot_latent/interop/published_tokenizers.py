"""Tokenizers of published models: byte-level BPE, read into a tiktoken encoding with the ids of the original.

Three layouts are read: Hugging Face's `tokenizer.json`, tiktoken's ranks (`tokenizer.model` of Llama 3), and GPT-2's
`vocab.json` with `merges.txt`. One is written: `tokenizer.json`. How their BPE becomes tiktoken's is in `bpe.py`.

One thing differs on purpose: text that spells a special token is ordinary text here (see `Tokenizer.encode`), where
Hugging Face's library needs `split_special_tokens=True` for that. All added tokens count as special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from simcot_latent.data.patterns import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN,
)
from simcot_latent.data.tokenizer import Tokenizer, read_ranks
from simcot_latent.errors import UserError
from simcot_latent.files import is_regular, read_json, read_text
from simcot_latent.interop.bpe import AMBIGUOUS, byte_level, merges_of, tokenizer_of_tokens, unused

TOKENIZER_JSON, TOKENIZER_CONFIG, TIKTOKEN_RANKS = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
VOCAB, MERGES = "vocab.json", "merges.txt"

# The 256 that follow Llama 3's ranks, from its tokenizer.py; later 3.x versions renamed some that were reserved.
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)

# Options of Hugging Face's BPE that byte-level tokenizers do not use: what they may be, the default first.
_MODEL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}

# An added token of this look is a mark that is not ordinary text, whether it is flagged as special or not.
_MARKUP = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a published model, named as its folder.

    The roles: `end` and `pad` as the folder's configuration files say (`pad` is `end` where they do not), `bos` if the
    tokenizer puts such a token before every text.

    Raises:
        UserError: there is none, a file is missing or broken, or tiktoken cannot do what it does; the message names
            the file and what is wrong in it.
    """
    for file, read in ((TOKENIZER_JSON, _read_json), (TIKTOKEN_RANKS, _read_tiktoken), (VOCAB, _read_vocab)):
        if is_regular(folder / file):
            return read(folder / file)
    raise UserError(
        f"{folder}: holds no tokenizer; it needs {TOKENIZER_JSON}, {TIKTOKEN_RANKS} (tiktoken's ranks), "
        f"or {VOCAB} and {MERGES}"
    )


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads with the same ids.

    Raises:
        UserError: Hugging Face's library reads the tokenizer's pattern otherwise.
    """
    if AMBIGUOUS.search(tokenizer.pattern):
        raise UserError(f"tokenizer {tokenizer.name}: in its pattern, a + after braces means another thing elsewhere")
    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special],
        "normalizer": None if tokenizer.normal_form is None else {"type": tokenizer.normal_form},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                _byte_level_step(use_regex=False),
            ],
        },
        "post_processor": _post_processor(tokenizer),
        "decoder": _byte_level_step(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken's rule
            # Special tokens too: those that are not there get ids after all the others when they are read.
            "vocab": {byte_level(token): i for token, i in tokenizer.ranks.items()} | dict(special),
            "merges": merges_of(tokenizer.ranks),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.roles.get("end"),
        "pad_token": tokenizer.roles.get("pad"),
        "bos_token": tokenizer.roles.get("bos"),
    }
    for file, value in ((TOKENIZER_JSON, content), (TOKENIZER_CONFIG, config)):
        (folder / file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`."""
    content = _json_object(file)
    match content:
        case {"model": {"vocab": dict(vocab), "merges": list(merges)} as model}:
            pass
        case _:
            raise UserError(f"{file}: holds no BPE of Hugging Face's library (a model with vocab and merges)")
    for key, allowed in _MODEL_OPTIONS.items():
        if model.get(key, allowed[0]) not in allowed:
            raise _unsupported(file, f"model.{key}", model[key], json.dumps(allowed[0]))
    special: dict[str, int] = {}
    added_tokens = content.get("added_tokens") or []
    for added in added_tokens if isinstance(added_tokens, list) else [added_tokens]:
        match added:
            case {"id": int(i), "content": str(token), **flags} if flags.get("special") or _MARKUP.fullmatch(token):
                special[token] = i
            case _:
                raise _unsupported(file, "added_tokens", added, "special tokens, and others that look like <...>")
    token_of = {i: token for token, i in (_checked_ids(file, vocab) | _checked_ids(file, special)).items()}
    if (most := max(token_of, default=-1)) >= 2 * len(token_of) + 1000:
        raise UserError(f"{file}: has {len(token_of):,} tokens, but one of id {most:,}; ids must have few holes")
    tokens = [token_of.get(i, unused(i)) for i in range(max(token_of, default=-1) + 1)]
    holes = set(range(len(tokens))) - token_of.keys()
    tokenizer = _build(
        file,
        tokens,
        [_merge(file, merge) for merge in merges],
        _pattern_of(file, content.get("pre_tokenizer")),
        holes | set(special.values()),
        _roles(file.parent, special, bos=_bos_of(file, content.get("post_processor"))),
        normal_form=_normal_form_of(file, content.get("normalizer")),
        ignore_merges=bool(model.get("ignore_merges")),
    )
    if tokenizer.missing_bytes and (model.get("unk_token") or model.get("byte_fallback")):
        raise UserError(
            f"{file}: model.unk_token or byte_fallback, and a vocabulary that lacks bytes, is not supported"
        )
    return tokenizer


def _read_tiktoken(file: Path) -> Tokenizer:
    """The tokenizer of Llama 3's ranks."""
    try:
        ranks = read_ranks(file)
        special = {token: i for i, token in enumerate(LLAMA3_SPECIAL_TOKENS, start=len(ranks))}
        bos, end = LLAMA3_SPECIAL_TOKENS[:2]
        return Tokenizer(_name(file), LLAMA3_PATTERN, ranks, special, _roles(file.parent, special, bos=bos, end=end))
    except UserError as error:
        at = "" if str(error).startswith(str(file)) else f"{file}: "
        raise UserError(f"{at}{error} (read as Llama 3's ranks; SentencePiece models are not supported)") from error


def _read_vocab(file: Path) -> Tokenizer:
    """The tokenizer of GPT-2's `vocab.json` and the `merges.txt` beside it."""
    tokenizer_class = _json_object(file.with_name(TOKENIZER_CONFIG), needed=False).get("tokenizer_class")
    if tokenizer_class not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(f"{file}: only GPT-2's is read, not that of {tokenizer_class}; give its {TOKENIZER_JSON}")
    ids = _checked_ids(file, _json_object(file))
    token_of = {i: token for token, i in ids.items()}
    if sorted(token_of) != list(range(len(ids))):
        raise UserError(f"{file}: ids must be 0 to {len(ids) - 1}, each once")
    # The lines are split at \n only: merges hold no other blank than the one between.
    lines = read_text(file.with_name(MERGES)).split("\n")
    merges = [line for n, line in enumerate(lines) if line and not (n == 0 and line.startswith("#version"))]
    end = "<|endoftext|>"
    if end not in ids:
        raise UserError(f"{file}: lacks {end}; only GPT-2's vocabulary is read, give {TOKENIZER_JSON} for others")
    roles = _roles(file.parent, {end: ids[end]}, end=end)
    return _build(file, [token_of[i] for i in range(len(ids))], merges, GPT2_PATTERN, {ids[end]}, roles)


def _build(
    file: Path,
    tokens: Sequence[str],
    merges: Sequence[str],
    pattern: str,
    special: Collection[int],
    roles: Mapping[str, str],
    **options: Any,
) -> Tokenizer:
    """`tokenizer_of_tokens` whose errors name the file."""
    try:
        return tokenizer_of_tokens(_name(file), tokens, merges, pattern, special, roles, **options)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _pattern_of(file: Path, component: Any) -> str:
    """The pattern that cuts text where a `pre_tokenizer` of Hugging Face's library does."""
    match _steps(component, "pretokenizers"):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return GPT2_PATTERN
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return DIGITS_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    supported = "ByteLevel with no prefix space, alone, after Digits (individual) or after Split (Regex, Isolated)"
    raise _unsupported(file, "pre_tokenizer", component, supported)


def _steps(component: Any, key: str) -> list[Any]:
    """The steps of a component that may be a sequence of them."""
    match component:
        case {"type": "Sequence", **rest} if isinstance(rest.get(key), list):
            return rest[key]
    return [component]


def _bos_of(file: Path, component: Any) -> str | None:
    """The token that a `post_processor` puts before a text."""
    bos = None
    for step in _steps(component, "processors"):
        match step:
            case None | {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                pass
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(bos)}}, {"Sequence": _}]}:
                pass
            case _:
                supported = "ByteLevel, and TemplateProcessing with at most one token, before the text"
                raise _unsupported(file, "post_processor", component, supported)
    return bos


def _normal_form_of(file: Path, component: Any) -> str | None:
    """The Unicode normal form that a `normalizer` brings text into."""
    match component:
        case None:
            return None
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" as form}:
            return form
    raise _unsupported(file, "normalizer", component, "null, NFC, NFD, NFKC and NFKD")


def _roles(
    folder: Path, special: Mapping[str, int], *, bos: str | None = None, end: str | None = None
) -> dict[str, str]:
    """Who plays which role: `end` and `pad` by the model's configuration, else the tokenizer's, else as given.

    A configuration's ids that are no special tokens are passed over: `transformers` writes its classes' defaults there.
    """
    models = [_json_object(folder / file, needed=False) for file in ("generation_config.json", "config.json")]
    tokenizers = _json_object(folder / TOKENIZER_CONFIG, needed=False)
    token_of = {i: token for token, i in special.items()}

    def named(role: str) -> str | None:
        token = tokenizers.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token = token if isinstance(token, str) and token in special else None
        for config in models:
            ids = config.get(f"{role}_token_id")
            listed = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
            names = [token_of[i] for i in listed if i in token_of]
            if names:  # of several, Llama 3's for example, the tokenizer's is the one that ends an answer
                return token if token in names else names[0]
        return token

    end = named("eos") or end
    roles = {"end": end, "pad": named("pad") or end, "bos": bos}
    return {role: token for role, token in roles.items() if token is not None}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """What puts the tokenizer's `bos` token before a text, if it has one."""
    if tokenizer.bos_id is None:
        return _byte_level_step()
    bos = tokenizer.roles["bos"]
    single, second = (
        [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": text, "type_id": n}}]
        for n, text in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


def _byte_level_step(use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _name(file: Path) -> str:
    return file.resolve().parent.name


def _merge(file: Path, merge: Any) -> str:
    """A merge of a `tokenizer.json`: by its age, a text or a pair."""
    match merge:
        case str():
            return merge
        case [str(left), str(right)]:
            return f"{left} {right}"
    raise UserError(f"{file}: model.merges holds {json.dumps(merge)}, which is no pair")


def _checked_ids(file: Path, vocab: dict[str, Any]) -> dict[str, int]:
    if wrong := [token for token, i in vocab.items() if type(i) is not int or i < 0]:
        raise UserError(f"{file}: the id of {wrong[0]!r} is no number from 0 on")
    return vocab


def _unsupported(file: Path, component: str, value: Any, supported: str) -> UserError:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return UserError(f"{file}: {component} {text} is not supported; supported: {supported}")


def _json_object(file: Path, *, needed: bool = True) -> dict[str, Any]:
    """A JSON object from a file; nothing from one that is not needed and not there."""
    return {} if not needed and not is_regular(file) else read_json(file)
