"""How good files are spoilt: as bytes, and as JSON whose values are replaced."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(-n for n in NUMBERS[1:]),
    10**30,
    10**4000,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    None,
    True,
    "",
    "a",
    "../../etc/passwd",
    "/dev/zero",
    "tokenizer/../../x",
    "nul\0byte",
    "\x1b[2J\u202e\ud83d\ude00\n",
    "F8_E4M3",
    "F4",
    "I64",
    "x" * 70_000,
    [],
    {},
    [[]],
    [2**62, 2**62],
    [-1, 1],
    [0],
    {"a": {"a": {}}},
    list(range(2000)),
)


def spoil_bytes(data: bytes, rng: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """Change one to four places, mostly between ``start`` and ``stop``, or cut the end off."""
    spoilt = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        last = len(spoilt) if stop is None or rng.random() < 0.1 else min(stop, len(spoilt))
        place = rng.randrange(start, max(last, start + 1))
        match rng.randrange(8):
            case 0 | 1:
                spoilt[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                spoilt[place : place + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
            case 3:
                spoilt[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
            case 4:
                del spoilt[place : place + rng.randint(1, 40)]
            case 5:
                spoilt[place:place] = spoilt[place : place + rng.randint(1, 400)]
            case 6:
                other = rng.randrange(len(spoilt) or 1)
                spoilt[place : place + 16] = spoilt[other : other + 16]
            case 7:
                del spoilt[place:]
    return bytes(spoilt)


def spoil_json(value: Any, rng: random.Random) -> bytes:
    """The text of ``value``, a JSON object, with one to three of its parts changed."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        _change_part(changed, rng)
    text = json.dumps(changed, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        text = _nest(text, rng)
    data = text.encode("utf-8", "surrogatepass")
    return spoil_bytes(data, rng) if rng.random() < 0.2 else data


def _change_part(root: Any, rng: random.Random) -> None:
    """Replace, remove, copy or rename one value somewhere below ``root``."""
    place = root
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = rng.choice(keys)
        below = place[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.25:
            break
        place = below
    match rng.randrange(6):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[rng.choice(("", "extra", "\x1b[2J", "../x", "a" * 5000))] = below
        case 2 if isinstance(below, int) and not isinstance(below, bool):
            place[key] = below + rng.choice((-1, 1, 8))
        case _:
            place[key] = copy.deepcopy(rng.choice(VALUES))


def _nest(text: str, rng: random.Random) -> str:
    """Put many lists into each other, or write a key twice."""
    if rng.random() < 0.5:
        depth = rng.choice((200, 5000, 100_000))
        return text.replace(":", ":" + "[" * depth, 1)
    return text.replace("{", "{" + text[1:-1] + ",", 1) if len(text) > 2 else text
