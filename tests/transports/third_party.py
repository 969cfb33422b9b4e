"""The transport that docs/TRANSPORTS.md shows, installed as another package would install it."""

from __future__ import annotations

import atexit
import functools
import itertools
import re
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "TRANSPORTS.md"
_numbers = itertools.count()


def block(kind: str) -> str:
    """The text of a code block of the page."""
    found = re.search(rf"^```{re.escape(kind)}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    if found is None:
        raise ValueError(f"{PAGE} has no block {kind}")
    return found[1]


def write_package(place: Path) -> None:
    """Write what ``pip install`` of such a package leaves: a module and its entry points."""
    (place / "unix_transport.py").write_text(block("python unix_transport.py"))
    _, _, entry_point = block("toml").partition("\n")
    scheme, _, value = entry_point.strip().partition(" = ")
    metadata = place / "unix_transport-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: unix-transport\nVersion: 1.0\n"
    )
    lines = f"[privatelora.transports]\n{scheme} = {value.strip(chr(34))}\n"
    (metadata / "entry_points.txt").write_text(lines)


@functools.cache
def installed() -> Path:
    """Make the package importable in this process, until it ends; a folder for its sockets."""
    directory = tempfile.TemporaryDirectory(prefix="privatelora-unix-")
    atexit.register(directory.cleanup)
    write_package(Path(directory.name))
    sys.path.append(directory.name)
    return Path(directory.name)


def free_address() -> str:
    """An address where nothing listens."""
    return f"unix://{installed()}/{next(_numbers)}.sock"
