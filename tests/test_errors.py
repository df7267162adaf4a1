"""A message is one line, whatever it quotes."""

from __future__ import annotations

import pytest

from simcot_latent.errors import UserError


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("blk\x0c1", r"blk\x0c1"),
        ("a\nb\r\nc\u2028d", r"a\nb\r\nc\u2028d"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("Tom \ud83d has", r"Tom \ud83d has"),
        ("Käse 3·4 ≥ 🍐", "Käse 3·4 ≥ 🍐"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_what_is_no_character_for_a_line_is_shown(quoted: str, shown: str) -> None:
    assert str(UserError(f"file: {quoted}")) == f"file: {shown}"
    assert len(str(UserError(quoted)).splitlines()) == 1
