"""Seeded damage to policy texts: what editors, merges, templates and malice do to YAML."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

ODD = (
    *(
        "",
        "null",
        "true",
        "no",
        "~",
        "{}",
        "[]",
        "[[[[",
        "}",
        "-",
        "?",
        ": :",
        "0",
        "-1",
        "1e999",
        ".inf",
        ".nan",
    ),
    *("0x1F", "1_000", "12:30:45", "2026-11-24", "2026-11-24T10:00:00Z", "!!python/object:os.system x"),
    *(
        "!!binary aGk=",
        "!!set {a}",
        "&a [*a]",
        "*nothing",
        "<<: *a",
        "30",
        "30m",
        "-30m",
        "1e3s",
        "99999999999d",
    ),
    *("5%", "101%", "-5%", "%", "dense", "sparse", "mild", "control", "rollback", "promote", "all_safe"),
    *("audit.kl", "audit.ki", "serve.failed", "betting", "Fri 16:00-Mon 08:00 Europe/Nowhere", '"\\u0000"'),
    *(
        "Fri 16:00-Mon 08:00 ../../etc/passwd",
        "Fri 25:00-Mon 08:00 UTC",
        "'" + "9" * 400 + "'",
        "9" * 400,
        "é\u202e",
    ),
    *("'" + "ä" * 3000 + "'", "|\n      text", "> folded", "# nothing", "{a: 1, a: 2}", "[0, 4096, 8192]"),
)
CHARACTERS = "\t\0\x07\u2028\ud7ff\ufeff 'é日😀\"{}[]&*!|>%@`:,#-?0a\n"
_VALUE = re.compile(r"(?<=[:,\[] )[^,\]}\n#]+")
_KEY = re.compile(r"[A-Za-z_]+(?=:)")


def mutate(text: str, seed: int) -> str:
    """The text with one to three kinds of damage; the same seed does the same."""
    dice = random.Random(seed)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3))):
        text = dice.choice(KINDS)(text, dice)
    return text


def _replace_value(text: str, dice: random.Random) -> str:
    return _replace(text, dice, _VALUE, dice.choice(ODD))


def _swap_values(text: str, dice: random.Random) -> str:
    found = [match.group() for match in _VALUE.finditer(text)]
    return _replace(text, dice, _VALUE, dice.choice(found) if found else "")


def _rename_key(text: str, dice: random.Random) -> str:
    keys = [match.group() for match in _KEY.finditer(text)] or ["x"]
    word = dice.choice(keys)
    names = (word + "s", word[:-1], word.upper(), dice.choice(keys), "<<", "__class__", "\u0430udit")
    return _replace(text, dice, _KEY, dice.choice(names))


def _replace(text: str, dice: random.Random, pattern: re.Pattern[str], new: str) -> str:
    places = [match.span() for match in pattern.finditer(text)]
    if not places:
        return text + new
    begin, stop = dice.choice(places)
    return text[:begin] + new + text[stop:]


def _move_lines(text: str, dice: random.Random) -> str:
    lines = text.split("\n")
    at, to = dice.randrange(len(lines)), dice.randrange(len(lines))
    kind = dice.choice(("drop", "twice", "swap", "indent", "dedent", "move", "comment"))
    if kind == "drop":
        del lines[at : at + dice.randint(1, 5)]
    elif kind in ("twice", "move"):
        lines.insert(to, lines[at])
        if kind == "move":
            del lines[at]
    elif kind == "swap":
        lines[at], lines[to] = lines[to], lines[at]
    else:
        lines[at] = {"indent": "  " + lines[at], "dedent": lines[at][2:], "comment": "#" + lines[at]}[kind]
    return "\n".join(lines)


def _damage_characters(text: str, dice: random.Random) -> str:
    for _ in range(dice.randint(1, 6)):
        at = dice.randint(0, len(text))
        kept = at + dice.choice((0, 0, 1, 2, 10))
        text = text[:at] + dice.choice(("", dice.choice(CHARACTERS))) + text[kept:]
    return text


def _cut(text: str, dice: random.Random) -> str:
    at = dice.randint(0, len(text))
    return dice.choice((text[:at], text[at:], text + "\n---\n" + text, text + text[at:], "﻿" + text))


def _blow_up(text: str, dice: random.Random) -> str:
    """Deep nesting, aliases that multiply, very many or very long values."""
    size = dice.choice((10, 40, 400, 3000))
    laughs = "x: &a0 [1]\n" + "".join(
        f"y{i}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(min(size, 30))
    )
    bombs = (
        "deep: " + "[" * size + "]" * size + "\n" + text,
        laughs + text,
        text + "\n" + "\n".join(f"k{i}: {i}" for i in range(size)),
        text + "\nlong: " + "1" * size * 20 + "m\n",
        re.sub(r"id: (\w+)", lambda found: f"id: {found[1]}{'_' * size}", text, count=1),
        text.replace("items:", "items: " + "[{}, " * min(size, 60) + "]" * min(size, 60), 1),
    )
    return dice.choice(bombs)


KINDS: tuple[Callable[[str, random.Random], str], ...] = (
    *(_replace_value, _replace_value, _replace_value, _swap_values, _rename_key, _rename_key),
    *(_move_lines, _move_lines, _damage_characters, _cut, _blow_up),
)
