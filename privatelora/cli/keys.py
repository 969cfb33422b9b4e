"""``privatelora keys``: what a cloud and an edge prove themselves to each other with."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml

from privatelora.cli._app import print_fields, print_json
from privatelora.errors import ConfigError

NEW_EXAMPLE = "Example: privatelora keys new my-cloud --host cloud.example --host 192.0.2.7"
TOKEN_EXAMPLE = "Example: privatelora keys token alice"
DEFAULT_DAYS = 730

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_RULE = "use up to 64 letters, digits, '.', '_', '-'"
# What stands in the settings where only the peer's keys are missing.
_PEER = "FROM-THE-OTHER-SIDE"

app = typer.Typer(no_args_is_help=True, help="Make keys for tls:// and zmq+tcp://, and tokens.")


class Kind(StrEnum):
    """Which keys to make."""

    TLS = "tls"
    CURVE = "curve"
    BOTH = "both"


def register(main: typer.Typer) -> None:
    """Add the commands to a program, as ``keys``."""
    main.add_typer(app, name="keys")


@app.command("new", epilog=NEW_EXAMPLE)
def new(
    name: Annotated[str, typer.Argument(help="Whose keys, such as my-cloud or alice.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or IP that edges dial; a cloud needs at least one. Repeatable."),
    ] = None,
    directory: Annotated[Path, typer.Option("--dir", help="Where the folder NAME is made.")] = Path(
        "keys"
    ),
    kind: Annotated[
        Kind, typer.Option(help="For tls:// addresses, for zmq+tcp:// addresses, or both.")
    ] = Kind.BOTH,
    days: Annotated[
        int | None,
        typer.Option(help="How long the certificate is valid.", show_default=str(DEFAULT_DAYS)),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make keys for a cloud or an edge: some to keep, some to give to the other side."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a folder of keys; {_NAME_RULE}")
    if kind is Kind.CURVE and (host or days is not None):
        raise ConfigError("--host and --days belong to a certificate; leave them out")
    hosts = host or []
    num_days = DEFAULT_DAYS if days is None else days
    folder = _make_folder(directory, name, kind, hosts, num_days)
    pairs = _pairs(folder, name, kind)
    if as_json:
        print_json(_summary(folder, hosts, pairs))
    else:
        _print(folder, hosts, pairs)


@app.command("token", epilog=TOKEN_EXAMPLE)
def token(
    name: Annotated[str, typer.Argument(help="Whose token; the cloud counts by this name.")],
    directory: Annotated[
        Path, typer.Option("--dir", help="Where the file NAME.token is made.")
    ] = Path("keys"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a token for an edge, and the line by which a cloud knows it."""
    from privatelora.runtime.client_tokens import NAME, digest, new_token

    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a client; {_NAME_RULE}")
    file, secret = directory / f"{name}.token", new_token()
    _write_secret(file, f"{secret}\n")
    edge = {"token": {"file": str(file.absolute())}}
    line = {name: digest(secret)}
    if as_json:
        print_json({"file": str(file), "settings": {"edge": edge, "tokens": line}})
        return
    print(f"Made {file}, which only you can read.\n")
    print(f"In the YAML file of the edge, which needs this file:\n\n{_yaml(edge)}")
    print("and in the file that the cloud's YAML file names as tokens, where it is no secret:\n")
    print(_yaml(line), end="")


def _write_secret(file: Path, text: str) -> None:
    """Write a new file that its owner alone can read, or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        if not file.exists():  # it is the directory that is something else
            raise ConfigError(f"cannot write into {file.parent}: {error.strerror}") from error
        raise ConfigError(f"{file} exists; choose another name, or move it away first") from error
    except OSError as error:
        raise ConfigError(f"cannot write into {file.parent}: {error.strerror}") from error
    try:
        with open(descriptor, "w", encoding="ascii") as opened:
            os.fchmod(descriptor, 0o600)  # never more; but a strict umask makes it less
            opened.write(text)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


class Pair(NamedTuple):
    """What was made for one mechanism, ``tls`` or ``curve``, and where its settings go."""

    mechanism: str
    schemes: str
    secret: Path
    public: Path
    this_side: dict[str, str]
    other_side: dict[str, str]


def _make_folder(directory: Path, name: str, kind: Kind, hosts: Sequence[str], days: int) -> Path:
    """Make the folder with everything in it, or nothing."""
    folder = directory / name
    try:
        if folder.exists():
            raise ConfigError(f"{folder} exists; choose another name, or move it away first")
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=directory))
        unfinished.chmod(0o700)  # never more; but a strict umask makes it less
    except OSError as error:
        raise ConfigError(f"cannot write into {directory}: {error.strerror}") from error
    try:
        _make_keys(unfinished, name, kind, hosts, days)
        unfinished.rename(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"cannot make {folder}: {error.strerror}") from error
        raise
    return folder


def _make_keys(folder: Path, name: str, kind: Kind, hosts: Sequence[str], days: int) -> None:
    if kind is not Kind.CURVE:
        from privatelora.transports.tls_keys import new_certificate

        new_certificate(folder / "tls.key", folder / f"{name}.crt", name, hosts, days)
    if kind is not Kind.TLS:
        from privatelora.transports.curve_keys import new_curve_key

        new_curve_key(folder / "curve.key", folder / f"{name}.pub")


def _pairs(folder: Path, name: str, kind: Kind) -> list[Pair]:
    here = folder.absolute()
    secret, public = folder / "tls.key", folder / f"{name}.crt"
    settings = {
        "certificate": str(here / public.name),
        "key": str(here / secret.name),
        "trust": f"{_PEER}.crt",
    }
    tls = Pair("tls", "tls://", secret, public, settings, {"trust": public.name})
    secret, public = folder / "curve.key", folder / f"{name}.pub"
    settings = {"key": str(here / secret.name), "trust": f"{_PEER}.pub"}
    schemes = "zmq+tcp:// and zmq+ipc://"
    curve = Pair("curve", schemes, secret, public, settings, {"trust": public.name})
    return [pair for pair in (tls, curve) if kind in (Kind.BOTH, pair.mechanism)]


def _identity(pairs: Sequence[Pair]) -> str | None:
    """As what the other side knows the certificate, if there is one."""
    from privatelora.transports.tls_context import identity_of

    for pair in pairs:
        if pair.mechanism == "tls":
            return identity_of(ssl.PEM_cert_to_DER_cert(pair.public.read_text()))
    return None


def _summary(folder: Path, hosts: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "keep": [str(pair.secret) for pair in pairs],
        "give": [str(pair.public) for pair in pairs],
        "hosts": list(hosts),
        "identity": _identity(pairs),
        "settings": {
            side: {pair.mechanism: getattr(pair, side) for pair in pairs}
            for side in ("this_side", "other_side")
        },
    }


def _print(folder: Path, hosts: Sequence[str], pairs: Sequence[Pair]) -> None:
    print(f"Made {folder}, a folder that only you can open.\n")
    uses = {}
    for pair in pairs:
        uses[pair.secret.name] = f"secret, for {pair.schemes}: keep it here"
        uses[pair.public.name] = f"belongs to {pair.secret.name}: give it to the other side"
    print_fields(uses)
    for number, pair in enumerate(pairs):
        instead = ", instead" if number else ""
        print(f"\nFor {pair.schemes}{instead}, in the YAML file here:\n")
        print(_yaml({pair.mechanism: pair.this_side}))
        print("and in that of the other side:\n")
        print(_yaml({pair.mechanism: pair.other_side}), end="")
    print("\nA cloud's trust may be a folder with the files of all its edges.")
    if identity := _identity(pairs):
        print("A cloud without trust lets in every edge over tls://.")
        if not hosts:
            print("The certificate is for an edge: a cloud's needs --host.")
        print(f"The other side knows the certificate as {identity}.")


def _yaml(settings: dict[str, Any]) -> str:
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=10_000))
