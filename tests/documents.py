"""What README, CONTRIBUTING and `docs/` tell readers to type: files, blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^`([\w./]+\.\w+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
PROGRAMS = ("python", "torchrun", "pip", "pytest", "ruff", "pyright", "mkdocs")
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)*=.*", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: the file's name.
        line: the command, as it stands there.
        words: the same without variables of the environment, as a shell splits it.
        is_block: whether it stands in a block of commands, and not in a sentence or a table.
    """

    page: str
    line: str
    words: tuple[str, ...]
    is_block: bool

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    @property
    def module(self) -> str | None:
        """What is run by `python -m`, also by ranks of torchrun."""
        runs_modules = self.words[0] == "torchrun" or self.words[:2] == ("python", "-m")
        return self.words[self.words.index("-m") + 1] if runs_modules and "-m" in self.words else None

    @property
    def arguments(self) -> list[str]:
        """What follows the module, or the file."""
        return list(self.words[self.words.index(self.module) + 1 :] if self.module else self.words[2:])


def load_hooks() -> Any:
    """`docs/hooks.py` as MkDocs loads it: by its place, as other packages may be called `docs`."""
    spec = spec_from_file_location("docs_hooks", REPOSITORY / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; commands have none."""
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def files(page: Path) -> dict[str, str]:
    """The files that a page prints: blocks below a line that is a name alone."""
    return dict(FILE.findall(page.read_text(encoding="utf-8")))


def commands(page: Path) -> list[Command]:
    """The commands of a page: every line of its blocks without a language, and code in its text that is one."""
    found = [(line, True) for block in blocks(page, "") for line in block.splitlines()]
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found += [(code, False) for code in INLINE.findall(text) if code.split()[0] in PROGRAMS and " " in code]
    return [
        Command(page.name, part, tuple(shlex.split(re.sub(r"^(?:[A-Z_]+=\S* )+", "", part))), is_block)
        for line, is_block in found
        for part in line.split(" && ")
    ]


def settings(page: Path) -> list[str]:
    """Code in the text of a page that consists of `key=value` alone."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = []
    for code in INLINE.findall(text):
        try:
            words = shlex.split(code)
        except ValueError:  # a quotation mark alone
            continue
        if words and all(SETTING.fullmatch(word) for word in words):
            found.append(code)
    return found
