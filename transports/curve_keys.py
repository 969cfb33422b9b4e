"""Files with CURVE keys.

A key pair is two small text files. Lines that start with ``#`` are comments; every other line is
``name: key``, with the key in Z85 (40 printable characters). The secret file (``.key``) has both
``public`` and ``secret``, the public file (``.pub``) has ``public`` only. No error shows a key
of a secret file.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import zmq
from zmq.utils import z85

from privatelora.errors import ConfigError

_SECRET_HEADER = "# CURVE key pair of one end of PrivateLoRA: keep it here, show it to nobody\n"
_PUBLIC_HEADER = "# CURVE public key of one end of PrivateLoRA: for the peers that shall trust it\n"
_MAX_FILE_NBYTES = 4096
_Z85_NUM_CHARS = 40


def new_curve_key(secret: Path, public: Path) -> None:
    """Make a key pair and write it to two new files.

    The secret file can be read by its owner only, from the start. Raises ConfigError if either
    file exists or cannot be written; then neither is left behind.
    """
    public_key, secret_key = (key.decode("ascii") for key in zmq.curve_keypair())
    line = f"public: {public_key}\n"
    _write_new(secret, f"{_SECRET_HEADER}{line}secret: {secret_key}\n", 0o600)
    try:
        _write_new(public, f"{_PUBLIC_HEADER}{line}", 0o644)
    except ConfigError:
        secret.unlink()
        raise


def read_secret_key(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key (Z85) of a secret file. Raises ConfigError."""
    keys = _read(path)
    if set(keys) != {"public", "secret"}:
        raise ConfigError(
            f"{path} holds no secret CURVE key; give the .key file that was made for this end"
        )
    if zmq.curve_public(keys["secret"]) != keys["public"]:
        raise ConfigError(
            f"{path} is damaged: its public key does not belong to its secret key; make new keys"
        )
    return keys["public"], keys["secret"]


def read_public_key(path: Path) -> bytes:
    """The key (Z85) of a public file. Raises ConfigError."""
    keys = _read(path)
    if "secret" in keys:
        raise ConfigError(
            f"{path} holds a secret CURVE key, which its owner alone should have; "
            "give the .pub file of the pair, and make new keys if this one was handed around"
        )
    if set(keys) != {"public"}:
        raise ConfigError(f"{path} holds no public CURVE key; give a .pub file")
    return keys["public"]


def read_public_keys(path: Path) -> frozenset[bytes]:
    """The keys (Z85) of a public file, or of all ``*.pub`` files in a folder, possibly none.

    Raises ConfigError.
    """
    if not path.is_dir():
        return frozenset([read_public_key(path)])
    try:
        files = sorted(path.glob("*.pub"))
    except OSError as error:
        raise ConfigError(f"cannot read the folder {path}: {_reason(error)}") from error
    return frozenset(read_public_key(file) for file in files)


def _write_new(path: Path, text: str, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and is not overwritten; choose another name or remove it first"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {_reason(error)}") from error
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise ConfigError(f"cannot write {path}: {_reason(error)}") from error


def _read(path: Path) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the CURVE key file {path}: {_reason(error)}; "
            "check the path and its permissions, or make keys first"
        ) from error
    if len(content) > _MAX_FILE_NBYTES:
        raise _not_a_key_file(path)
    keys: dict[str, bytes] = {}
    for line in content.splitlines():
        if not line.strip() or line.startswith(b"#"):
            continue
        name, _, value = line.partition(b":")
        key = value.strip()
        if name not in (b"public", b"secret") or name.decode() in keys or not _is_key(key):
            raise _not_a_key_file(path)
        keys[name.decode()] = key
    return keys


def _is_key(text: bytes) -> bool:
    if len(text) != _Z85_NUM_CHARS:
        return False
    try:
        z85.decode(text)
    except (KeyError, struct.error):  # a character, or a value, that Z85 does not have
        return False
    return True


def _not_a_key_file(path: Path) -> ConfigError:
    # The content is not shown: it may be a secret with a slip in it.
    return ConfigError(f"{path} is not a CURVE key file; make one with: privatelora keys new")


def _reason(error: OSError) -> str:
    return error.strerror.lower() if error.strerror else str(error)
