"""Tokens: tiktoken encodings with the project's special tokens.

Two are offered. `default_tokenizer` is a small byte-level BPE whose ranks file is shipped, so that nothing is
downloaded; `gpt2_tokenizer` is tiktoken's GPT-2 encoding. Both end in the same four special tokens.

The shipped ranks are regenerated, byte for byte, by this command (with GSM8K's files in the folder named last):

    python -m simcot_latent.data.train_tokenizer --out simcot_latent/data/ranks/default.tiktoken \
        --arithmetic 20000 --gsm8k ../shared/data/gsm8k
"""

from __future__ import annotations

import base64
import json
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import tiktoken

from simcot_latent.data.patterns import KNOWN_PATTERNS, PATTERN, finds_nothing, pieces, require_pattern
from simcot_latent.errors import UserError
from simcot_latent.files import MAX_TEXT, read_bytes, read_json
from simcot_latent.text import character_starts, valid_text

BOT = "<|bot|>"  # the thoughts begin
EOT = "<|eot|>"  # the thoughts end, the answer begins
END = "<|end|>"  # the text ends
PAD = "<|pad|>"
SPECIAL_TOKENS = (BOT, EOT, END, PAD)
ROLES = ("bot", "eot", "end", "pad", "bos")
"""What special tokens are there for: the four above, and `bos`, which prompts begin with where there is one."""

USES = {
    "bot": "thoughts begin after",
    "eot": "thoughts end with",
    "end": "texts end with",
    "pad": "stands for nothing",
    "bos": "prompts begin with",
}

VOCABULARY_MULTIPLE = 64
"""Vocabularies that grow are filled up to a multiple of this, which matrix products are faster for."""

LONG = 10_000
"""Characters from which on a text is not given to tiktoken as a whole: over a run of some 100,000 blanks, patterns with
a lookahead overflow its stack."""

_RANKS_FILE = "ranks.tiktoken"
_CONFIG_FILE = "tokenizer.json"
TOKENIZER_FILES = (_RANKS_FILE, _CONFIG_FILE)
"""What `Tokenizer.save` writes."""


class Tokenizer:
    """A tiktoken encoding together with what it takes to save it, and spans of text mapped to tokens.

    Attributes:
        name: what it is called in reports and in its folder.
        file: the file that its roles were read from, for errors; None: another way.
        encoding: the `tiktoken.Encoding` behind it.
        roles: what each of `ROLES` that it has is called.
        n_vocab: number of ids; every id from 0 to n_vocab - 1 is a token.
        pattern, ranks, special_tokens, normal_form, missing_bytes: as in the constructor.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        roles: Mapping[str, str] | None = None,
        normal_form: str | None = None,
        missing_bytes: bytes = b"",
    ) -> None:
        """
        Args:
            name: see the class.
            pattern: regular expression (tiktoken's dialect) of the pieces that tokens never cross.
            ranks: a token's bytes to its id; ids are merge priorities.
            special_tokens: a special token's text to its id.
            roles: each of `ROLES` to the special token that plays it. None: `SPECIAL_TOKENS` play their own.
            normal_form: Unicode normal form (NFC, ..) that text is brought into first. None: none.
            missing_bytes: single bytes that are no tokens. Published vocabularies lack those that their training text
                did not hold; such bytes are left out of the pieces of a text, as Hugging Face's BPE does.

        Raises:
            UserError: the ranks lack another single byte, the ids are not 0, 1, 2, ..., a token that plays a role is
                missing, or the pattern is no regular expression, or one that is not used (see `patterns`).
        """
        if pattern not in KNOWN_PATTERNS:
            require_pattern(pattern)
        roles = dict(zip(ROLES, SPECIAL_TOKENS, strict=False)) if roles is None else dict(roles)
        if missing := [token for token in roles.values() if token not in special_tokens]:
            raise UserError(f"special tokens lack {', '.join(missing)}")
        if unknown := [role for role in roles if role not in ROLES]:
            raise UserError(f"unknown role {unknown[0]}: must be one of {', '.join(ROLES)}")
        if normal_form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise UserError(f"unknown normal form {normal_form}: must be NFC, NFD, NFKC, NFKD or null")
        if {byte for byte in range(256) if bytes([byte]) not in ranks} != set(missing_bytes):
            which = f" but {missing_bytes.hex(' ')}" if missing_bytes else ""
            raise UserError(f"ranks must hold each of the 256 single bytes{which}")
        # Specials decode to nothing, which is all that `decode` and the spans need to know of them.
        token_bytes = {rank: token for token, rank in ranks.items()} | dict.fromkeys(special_tokens.values(), b"")
        n_vocab = len(ranks) + len(special_tokens)
        if len(token_bytes) != n_vocab or min(token_bytes) != 0 or max(token_bytes) != n_vocab - 1:
            raise UserError(f"ids of the ranks and special tokens together must be 0 to {n_vocab - 1}, each once")
        try:
            self.encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(special_tokens)
            )
        except UnicodeEncodeError as error:
            raise UserError("pattern and special tokens must be valid Unicode, without lone surrogates") from error
        except ValueError as error:
            raise UserError(f"pattern is not a regular expression: {' '.join(str(error).split())[:200]}") from error
        except BaseException as error:
            if is_panic(error):
                raise UserError(f"tiktoken cannot use these tokens ({' '.join(str(error).split())[:200]})") from error
            raise
        self.name = name
        self.file: Path | None = None
        self.n_vocab = n_vocab
        self.roles = roles
        self.pattern = pattern
        self.ranks = dict(ranks)
        self.special_tokens = dict(special_tokens)
        self.normal_form = normal_form
        self.missing_bytes = missing_bytes
        self._bytes = [token_bytes[i] for i in range(n_vocab)]
        self._lengths = [len(token) for token in self._bytes]

    def __eq__(self, other: object) -> bool:
        """Whether both give every text the same ids."""
        if not isinstance(other, Tokenizer):
            return NotImplemented
        ours, theirs = ((t.pattern, t.ranks, t.special_tokens, t.roles, t.normal_form) for t in (self, other))
        return ours == theirs

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, n_vocab={self.n_vocab})"

    @property
    def bot_id(self) -> int:
        """The token that thoughts begin after."""
        return self.id_of("bot")

    @property
    def eot_id(self) -> int:
        """The token that thoughts end with."""
        return self.id_of("eot")

    @property
    def end_id(self) -> int:
        """The token that texts end with."""
        return self.id_of("end")

    @property
    def pad_id(self) -> int:
        return self.id_of("pad")

    @property
    def bos_id(self) -> int | None:
        """The token that prompts begin with; None: none."""
        return self.id_of("bos") if "bos" in self.roles else None

    def id_of(self, role: str) -> int:
        """The id of the special token that plays a role.

        Raises:
            UserError: none does.
        """
        if role not in self.roles:
            where = f"tokenizer {self.name}" if self.file is None else f"{self.file}: roles"
            verb = "has" if self.file is None else "name"
            raise UserError(f"{where} {verb} no {role} token, which {USES[role]}")
        return self.special_tokens[self.roles[role]]

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, special or not; None: there is none."""
        return self.special_tokens.get(token, self.ranks.get(token.encode()))

    def with_roles(self, roles: Mapping[str, str], multiple: int = 1) -> Tokenizer:
        """A tokenizer with further roles; tokens that it lacks for them are added behind its last.

        Args:
            roles: as in the constructor; what has a role already keeps it.
            multiple: the vocabulary is filled up to a multiple of this with tokens that stand for nothing.
        """
        roles = {**roles, **self.roles}
        names = [token for token in dict.fromkeys(roles.values()) if token not in self.special_tokens]
        total = -(-(self.n_vocab + len(names)) // multiple) * multiple if names else self.n_vocab
        return self._extended(names, total, roles)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """A tokenizer with further special tokens, behind its last and in this order."""
        return self._extended(tokens, self.n_vocab + len(tokens), self.roles)

    def filled_up_to(self, n_vocab: int) -> Tokenizer:
        """A tokenizer of `n_vocab` ids: those that it lacks stand for nothing."""
        return self if n_vocab == self.n_vocab else self._extended([], n_vocab, self.roles)

    def _extended(self, names: Sequence[str], n_vocab: int, roles: Mapping[str, str]) -> Tokenizer:
        ids = range(self.n_vocab, n_vocab)
        names = [*names, *(f"<|unused_{i}|>" for i in ids[len(names) :])]
        special_tokens = self.special_tokens | dict(zip(names, ids, strict=True))
        return Tokenizer(
            self.name, self.pattern, self.ranks, special_tokens, roles, self.normal_form, self.missing_bytes
        )

    def normalised(self, text: str) -> str:
        """The text that is encoded: valid (see `valid_text`), and in the tokenizer's normal form."""
        text = valid_text(text)
        return text if self.normal_form is None else unicodedata.normalize(self.normal_form, text)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never a special one: text that spells a special token is ordinary text.

        A lone surrogate, which no UTF-8 text can hold, is read as U+FFFD.
        """
        text = self.normalised(text)
        return self._encode_pieces(text)[0] if self._in_pieces(text) else self._encode_whole(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are not UTF-8 become U+FFFD.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        return b"".join(self._token_bytes(ids)).decode("utf-8", errors="replace")

    def token_spans(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """Where each token lies in `decode(ids)`, as character offsets (start, end).

        A token that holds only part of a character spans the whole of it, so the spans of neighbours may overlap;
        a special token's span is empty.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        tokens = self._token_bytes(ids)
        starts = character_starts(b"".join(tokens))
        spans: list[tuple[int, int]] = []
        begin = 0
        for token in tokens:
            end = begin + len(token)
            last = bisect_left(starts, end)  # characters that start before the token's end
            first = bisect_right(starts, begin) - 1 if token else last
            spans.append((first, last))
            begin = end
        return spans

    def encode_with_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids of `text`, and for each whether any of its characters lies inside one of `spans`.

        Args:
            text: encoded as by `encode`.
            spans: character offsets (start, end) in `text`, in any order; an empty span holds no token.

        Raises:
            ValueError: a span does not lie in the text.
        """
        text, spans = self._normalised_spans(text, spans)
        if self._in_pieces(text):
            ids, starts, ends = self._encode_pieces(text)
        else:
            ids = self._encode_whole(text)
            # Tokens cut the text's bytes, so a running sum of their lengths says which bytes each one holds.
            ends = list(accumulate(map(self._lengths.__getitem__, ids)))
            starts = [0, *ends[:-1]]
        in_span = [False] * len(ids)
        for start, end in spans:
            if start == end:
                continue
            if not text.isascii():
                start, end = len(text[:start].encode()), len(text[:end].encode())
            first = bisect_right(ends, start)  # the first token that ends after the span's start
            stop = bisect_left(starts, end)  # the first that starts after the span
            in_span[first:stop] = [True] * (stop - first)
        return ids, in_span

    def _in_pieces(self, text: str) -> bool:
        """Whether tiktoken is given a text piece by piece: if some byte of it is no token, or if tiktoken's own cutting
        is not to be trusted, with a pattern that we do not know or a text that is very long.
        """
        if self.pattern not in KNOWN_PATTERNS or (len(text) > LONG and self.pattern != PATTERN):
            return True
        return bool(self.missing_bytes) and not set(self.missing_bytes).isdisjoint(text.encode())

    def _encode_whole(self, text: str) -> list[int]:
        try:
            return self.encoding.encode_ordinary(text)
        except BaseException as error:
            if is_panic(error):
                raise UserError(
                    f"tokenizer {self.name}: tiktoken gave up on a text of {len(text):,} characters "
                    f"({' '.join(str(error).split())[:200]})"
                ) from error
            raise

    def _encode_pieces(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of normalised text whose missing bytes are left out; where in its bytes each starts and ends.

        Tokens may join bytes on both sides of one that is left out, but only inside a piece, so the pieces are cut
        first: tiktoken, which does not tell them, is given them one by one.

        Raises:
            UserError: the pattern takes too long.
        """
        ids: list[int] = []
        kept: list[int] = []  # where the bytes are that are not left out
        begin = 0
        for cut in pieces(self.pattern, text):
            piece = cut.encode()
            kept += (begin + i for i, byte in enumerate(piece) if byte not in self.missing_bytes)
            begin += len(piece)
            if rest := piece.translate(None, self.missing_bytes):
                ids += self.encoding._encode_single_piece(rest)
        bounds = list(accumulate(map(self._lengths.__getitem__, ids), initial=0))
        return ids, [kept[n] for n in bounds[:-1]], [kept[n - 1] + 1 for n in bounds[1:]]

    def _normalised_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """The text that is encoded, and where spans of the given one lie in it."""
        for start, end in spans:
            if not 0 <= start <= end <= len(text):
                raise ValueError(f"span ({start}, {end}) does not lie in a text of {len(text)} characters")
        normal = self.normalised(text)
        if self.normal_form is not None:
            spans = [(len(self.normalised(text[:start])), len(self.normalised(text[:end]))) for start, end in spans]
        return normal, list(spans)

    def save(self, folder: str | Path) -> None:
        """Writes `ranks.tiktoken` and `tokenizer.json` into `folder`, from which `load` reads them with no network."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_ranks(folder / _RANKS_FILE, self.ranks)
        config = {
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "roles": self.roles,
            "normal_form": self.normal_form,
            "missing_bytes": list(self.missing_bytes),
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer that `save` wrote into `folder`.

        Raises:
            UserError: a file is missing or broken; the message names it.
        """
        config_file, ranks_file = Path(folder) / _CONFIG_FILE, Path(folder) / _RANKS_FILE
        config = read_json(config_file)
        match config:
            case {"name": str(name), "pattern": str(pattern), "special_tokens": dict(special_tokens)} if all(
                type(i) is int for i in special_tokens.values()
            ):
                pass
            case _:
                raise UserError(f"{config_file}: needs name and pattern (text) and special_tokens (text to id)")
        roles, normal_form = config.get("roles"), config.get("normal_form")
        if not (roles is None or (isinstance(roles, dict) and all(isinstance(x, str) for x in roles.values()))):
            raise UserError(f"{config_file}: roles must be a mapping from roles to special tokens")
        missing_bytes = config.get("missing_bytes", [])
        if not isinstance(missing_bytes, list) or not all(type(x) is int and 0 <= x < 256 for x in missing_bytes):
            raise UserError(f"{config_file}: missing_bytes must be a list of numbers from 0 to 255")
        ranks = read_ranks(ranks_file)
        try:
            tokenizer = cls(name, pattern, ranks, special_tokens, roles, normal_form, bytes(missing_bytes))
            if finds_nothing(pattern):
                raise UserError(f"pattern {pattern[:60]!r} finds no piece in any text, so all of it would be dropped")
        except UserError as error:
            raise UserError(f"{config_file} with {ranks_file.name}: {error}") from error
        tokenizer.file = config_file
        return tokenizer

    def _token_bytes(self, ids: Iterable[int]) -> list[bytes]:
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.n_vocab:  # a negative index would find a token, the wrong one
                raise IndexError(f"token id {i} is not in 0 to {self.n_vocab - 1}")
        return [self._bytes[i] for i in ids]


def default_tokenizer(ranks: str | Path | None = None) -> Tokenizer:
    """Our byte-level BPE: 2048 tokens, digits single, `<<`, `>>`, `####` and every operator a token of its own.

    Args:
        ranks: a ranks file that `simcot_latent.data.train_tokenizer` wrote, in place of the shipped one.

    Raises:
        UserError: the file is missing or broken.
    """
    file = Path(ranks).expanduser() if ranks is not None else Path(__file__).parent / "ranks" / "default.tiktoken"
    table = read_ranks(file)
    try:
        return Tokenizer(file.stem, PATTERN, table, _after(table.values()))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def gpt2_tokenizer() -> Tokenizer:
    """tiktoken's GPT-2 encoding (50,257 ids) with the special tokens after `<|endoftext|>`: 50257 to 50260.

    Raises:
        UserError: tiktoken neither has its files nor can download them.
    """
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; a download that is not the file
        raise UserError(
            "tokenizer=gpt2: tiktoken cannot get its gpt2 files; set TIKTOKEN_CACHE_DIR to a folder that holds them, "
            "or use tokenizer=default, which downloads nothing"
        ) from error
    # These private fields are how tiktoken's own documentation extends an encoding.
    special_tokens = gpt2._special_tokens | _after([gpt2.max_token_value])
    return Tokenizer("gpt2", gpt2._pat_str, gpt2._mergeable_ranks, special_tokens)


def is_panic(error: BaseException) -> bool:
    """Whether tiktoken, which is written in Rust, has panicked: an exception that is no `Exception`."""
    return type(error).__name__ == "PanicException"


def read_ranks(file: str | Path) -> dict[bytes, int]:
    """Ranks in tiktoken's format: a line a token, its bytes in base64, a space, its rank.

    Raises:
        UserError: the file is missing, or a line of it is broken; the message names both.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(Path(file), MAX_TEXT).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: not a token in base64, a space and its rank") from error
        if len(ranks) < number:
            raise UserError(f"{file}, line {number}: the token is there twice")
    return ranks


def write_ranks(file: str | Path, ranks: Mapping[bytes, int]) -> None:
    """Writes what `read_ranks` reads, in the order of the ranks."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda r: r[1])]
    Path(file).write_bytes(b"".join(lines))


def _after(ids: Iterable[int]) -> dict[str, int]:
    """The special tokens with the ids after the last of `ids`."""
    return {token: i for i, token in enumerate(SPECIAL_TOKENS, start=max(ids, default=-1) + 1)}
