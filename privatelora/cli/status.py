"""``privatelora status``: how an edge or a cloud that runs is."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from privatelora.cli._app import format_nbytes, print_fields, print_json
from privatelora.errors import AuthError, ConfigError, ConnectError

if TYPE_CHECKING:
    from pydantic import SecretStr

EXAMPLES = """Examples:

privatelora status configs/edge-lan.yaml

privatelora status 127.0.0.1:9464 --json
"""

KEY_VARIABLE = "PRIVATELORA_API_KEY"
EDGE_PATH = "/v1/privatelora/status"
METRICS_PREFIX = "privatelora_cloud_"
TIMEOUT_S = 10.0
INTERVAL_S = 1.0
"""Between the two looks at a cloud's counters that make rates of them."""
MAX_ANSWER_NBYTES = 4 * 2**20


class Target(NamedTuple):
    """Where to ask. ``base``: http(s)://host:port."""

    base: str
    api_key: SecretStr | None


def register(app: typer.Typer) -> None:
    """Add the command to a program."""
    app.command("status", epilog=EXAMPLES)(status)


def status(
    where: Annotated[
        str,
        typer.Argument(
            metavar="ADDRESS|FILE",
            help="YAML file of an edge or a cloud, or host:port of the edge's http or the cloud's "
            "metrics.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show how an edge or a cloud that runs is.

    An edge that asks for an API key gets the one that its file names, or, without the file, that
    in the environment variable PRIVATELORA_API_KEY.
    """
    target = _target(where)
    code, body = _get(target, EDGE_PATH)
    if code == http.client.UNAUTHORIZED:
        raise AuthError(
            f"{target.base} asks for an API key: give the edge's YAML file, or set {KEY_VARIABLE}"
        )
    if code == http.client.OK:
        state = {"kind": "edge", "address": target.base, **_object(body, target)}
        fields = _edge_fields(state)
    else:
        state = _cloud_state(target)
        fields = _cloud_fields(state)
    if as_json:
        print_json(state)
    else:
        print_fields({name: _printable(value) for name, value in fields.items()})


def _target(where: str) -> Target:
    """From a file, or else an address. Raises ConfigError."""
    if Path(where).suffix in (".yaml", ".yml") or Path(where).is_file():
        return _target_in(Path(where))
    from pydantic import SecretStr

    key = os.environ.get(KEY_VARIABLE)
    api_key = SecretStr(key) if key else None
    parts = urlsplit(where if "://" in where else f"http://{where}")
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/")
        usable = usable and (parts.port is not None or parts.scheme == "https")
    except ValueError:
        usable = False
    if not usable or parts.query or parts.username:
        raise ConfigError(
            f"{where!r} is neither a YAML file nor an address such as 127.0.0.1:18231"
        )
    return Target(f"{parts.scheme}://{parts.netloc}", api_key)


def _target_in(path: Path) -> Target:
    from privatelora.runtime.config import CloudConfig, EdgeConfig
    from privatelora.runtime.config_check import MODELS, kind_of
    from privatelora.yaml_file import as_model, read_mapping

    values = read_mapping(path, "listen")
    config = as_model(values, path, MODELS[kind_of(values, path)])
    if isinstance(config, EdgeConfig):
        secret = config.http.api_key
        api_key = None if secret is None else secret.read()
        return Target(_base(path, "http.listen", config.http.listen), api_key)
    if not isinstance(config, CloudConfig):
        raise ConfigError(f"{path} is a plan; give the file of an edge or a cloud")
    if config.metrics is None:
        raise ConfigError(
            f"{path}: this cloud does not tell how it is; set metrics: 127.0.0.1:9464 and start it "
            "again"
        )
    return Target(_base(path, "metrics", config.metrics), None)


def _base(path: Path, key: str, listen: str) -> str:
    from privatelora.runtime.host_port import parse_host_port

    host, port = parse_host_port(listen)
    if port == 0:
        raise ConfigError(
            f"{path}: {key}: port 0 is any free one; give the address that the daemon printed or "
            "logged (--verbose)"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every interface: also this
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _get(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body of an answer. Raises ConnectError if there is none."""
    parts = urlsplit(target.base)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    headers = {}
    if target.api_key is not None:
        headers["Authorization"] = f"Bearer {target.api_key.get_secret_value()}"
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_NBYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no answer in HTTP"
        raise ConnectError(
            f"nothing tells its status at {target.base}: {reason.lower()}; check the address, and "
            "that the daemon is running"
        ) from error
    finally:
        connection.close()
    if len(body) > MAX_ANSWER_NBYTES:
        raise _is_something_else(target)
    return answer.status, body


def _object(body: bytes, target: Target) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _is_something_else(target) from error
    if not isinstance(values, dict):
        raise _is_something_else(target)
    return values


def _is_something_else(target: Target) -> ConnectError:
    return ConnectError(
        f"{target.base} is neither an edge of PrivateLoRA nor the metrics of a cloud; check the "
        "address"
    )


def _cloud_state(target: Target) -> dict[str, Any]:
    before, started = _metrics(target), time.monotonic()
    time.sleep(INTERVAL_S)
    after, elapsed_s = _metrics(target), time.monotonic() - started
    _, ready = _get(target, "/health/ready")
    return {
        "kind": "cloud",
        "address": target.base,
        "state": ready.decode(errors="replace").strip(),
        **after,
        "per_second": {
            name.removesuffix("_total"): (after[name] - before.get(name, 0.0)) / elapsed_s
            for name in after
            if name.endswith("_total")
        },
    }


def _metrics(target: Target) -> dict[str, float]:
    """Counters and gauges of a cloud, without the prefix that all share."""
    from prometheus_client.parser import text_string_to_metric_families

    code, body = _get(target, "/metrics")
    values: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(body.decode()):
            if family.type in ("counter", "gauge"):
                for sample in family.samples:
                    if sample.name.startswith(METRICS_PREFIX) and not sample.labels:
                        values[sample.name.removeprefix(METRICS_PREFIX)] = sample.value
    except ValueError as error:
        raise _is_something_else(target) from error
    if code != http.client.OK or "sessions" not in values:
        raise _is_something_else(target)
    return values


def _edge_fields(state: Mapping[str, Any]) -> dict[str, str]:
    get = state.get
    rtt_ms = get("rtt_ms")
    return {
        "edge": f"{state['address']} ({get('version', '?')})",
        "cloud": str(get("cloud", "?")),
        "connected": f"yes, to {get('software')}" if get("connected") else f"no: {get('problem')}",
        "round trip": "?" if rtt_ms is None else f"{float(rtt_ms):.1f} ms",
        "models": ", ".join(map(str, get("models", []))),
        "context": f"{get('max_positions', 0):,} tokens",
        "conversations": f"{get('open_conversations', 0)} open, {get('busy_conversations', 0)} "
        "answer now",
    }


def _cloud_fields(state: Mapping[str, Any]) -> dict[str, str]:
    def count(name: str) -> str:
        return f"{state.get(name, 0):,.0f}"

    rates = state["per_second"]
    used, blocks = state.get("kv_blocks_used", 0), state.get("kv_blocks", 0)
    return {
        "cloud": str(state["address"]),
        "state": str(state["state"]),
        "edges": f"{count('connections')} connected",
        "sessions": f"{count('sessions')} open, {count('waiting_sessions')} wait, "
        f"{count('detached_sessions')} may come back",
        "so far": f"{count('sessions_opened_total')} opened, "
        f"{count('sessions_refused_total')} refused, {count('sessions_evicted_total')} evicted, "
        f"{count('sessions_resumed_total')} resumed",
        "KV cache": f"{used:,.0f} of {blocks:,.0f} blocks ({used / max(blocks, 1):.0%})",
        "throughput": f"{rates.get('positions', 0):,.1f} tokens/s, "
        f"{rates.get('batches', 0):,.1f} batches/s",
        "network": f"{format_nbytes(int(rates.get('received_bytes', 0)))}/s in, "
        f"{format_nbytes(int(rates.get('sent_bytes', 0)))}/s out",
    }


def _printable(text: str) -> str:
    """Without control characters: the text may come from elsewhere."""
    return "".join(character if character.isprintable() else "?" for character in text)
