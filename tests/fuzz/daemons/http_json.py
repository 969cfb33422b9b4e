"""Good HTTP with requests that mean nothing good: bodies, paths, queries, methods."""

from __future__ import annotations

import asyncio
import copy
import json
from functools import partial
from random import Random
from typing import Any

from tests.fuzz.daemons.http_bytes import classify, request
from tests.fuzz.daemons.inputs import Input, Outcome, Violation
from tests.fuzz.daemons.pipes import Pipe
from tests.fuzz.mutations import pick

MAX_TOKENS = 6
_DEADLINE_S = 40.0

_COMMON: dict[str, Any] = {
    "model": "adapter",
    "max_tokens": MAX_TOKENS,
    "n": 1,
    "stop": ["zzz"],
    "seed": 3,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "ignore_eos": True,
    "stream": False,
}
CHAT: dict[str, Any] = {
    **_COMMON,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": MAX_TOKENS,
    "response_format": {"type": "text"},
}
COMPLETION: dict[str, Any] = {
    **_COMMON,
    "prompt": ["How many apples", [5, 6, 7]],
    "echo": True,
    "logprobs": 1,
    "best_of": 1,
    "suffix": "",
}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 16, 17, 20, 21, 64, 65, 256, 257, 2**31 - 1, 2**31),
    *(2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**40, 0.0, -0.0, 0.5, 1e-300, 1e300, 2.5),
    *("", "a", "\0", "\u2028", "é" * 40, "😀", "x" * 3000, "x" * 100_000, "null", "1", "NaN"),
    *([], [[]], {}, [None], [1], ["a"], [[1, 2]], [["a"]], [0] * 300, [{}], {"a": {}}, {"": ""}),
    *({"type": "text"}, {"type": "image_url", "image_url": {"url": "x"}}, [[[[[[]]]]]]),
    *(["x"] * 17, ["x"] * 65, {str(i): 1 for i in range(1025)}, {"-1": 1}, {"1e3": 1}, {"9999": 1}),
)
_SCHEMAS: tuple[Any, ...] = (
    *({}, {"type": "object"}, {"type": "integer"}, {"type": "nonsense"}, {"$ref": "#"}, True),
    *({"$ref": "http://127.0.0.1:1/x"}, {"$ref": "#/none"}, {"allOf": [{"$ref": "#"}]}),
    *({"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "("}),
    *({"type": "string", "pattern": "a{1,100000}"}, {"type": "string", "minLength": 10**9}),
    *({"type": "string", "pattern": "(x{1,50}){1,50}"}, {"type": "string", "maxLength": 10**6}),
    *({"type": "array", "minItems": 10**6}, {"enum": list(range(3000))}, {"enum": []}),
    *({"type": "number", "multipleOf": 1e-9}, {"type": "integer", "minimum": 5, "maximum": 1}),
    *({"anyOf": []}, {"not": {}}, {"const": "x" * 20000}, {"type": ["string", "null"]}),
    {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}},
    {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}},
)
_TEXTS = (
    *(b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"{}x"),
    *(b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}', b'{"n": -Infinity}'),
    *(b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"seed": 1' + b"0" * 400 + b".0}"),
    *(b'{"prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}', b'{"\\udfff": 1, "prompt": "a"}'),
    *(b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"),
    *(
        b'{"prompt": "a", "prompt": "b", "max_tokens": 1}',
        b'{"prompt": "\x01"}',
        b'{"prompt": "a" }\0',
    ),
    b'{"messages": [{"role": "user", "content": "\\ud83d"}], "max_tokens": 1}',
    b'{"temperature": 1e999, "prompt": "a", "max_tokens": 1}',
)
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")
_PATHS = (
    *("/", "/page/", "/page/x", "/page/..%2f..%2fetc%2fpasswd", "/page/%00", "/health/live"),
    *("/health/ready", "/metrics", "/v1/models", "/v1/models/adapter", "/v1/models/%ff%fe"),
    *("/v1/models/" + "x" * 5000, "/v1/models/a/b/../c", "/v1/chat/completions", "/v1/completions"),
    *("/v1/privatelora/status", "/v1/privatelora/sent", "/v1/privatelora/sent?after=5"),
    *("/v1/privatelora/sent?after=-1", "/v1/privatelora/sent?after=%D9%A3", "/v1/", "//v1/models"),
    *("/v1/privatelora/sent?after=--1", "/v1/privatelora/sent?after=" + "9" * 15, "/favicon.ico"),
    *(
        "/v1/privatelora/sent?after=-",
        "/v1/privatelora/sent?after=1&after=x",
        "/%2e%2e/",
        "/?" + "a=b&" * 2000,
    ),
    *("/v1/privatelora/sent?after=%C2%B2", "/v1/models/%00", "/v1/models/", "/page/index.html"),
)


class HttpJson:
    """Makes inputs for every route of an edge."""

    def __init__(self, port: int) -> None:
        self._port = port

    def make(self, rng: Random) -> Input:
        if rng.random() < 0.15:
            method, path = pick(rng, _METHODS), pick(rng, _PATHS)
            body = b"{}" if rng.random() < 0.2 else b""
            return self._input("route", request(method, path, body), leaves=False)
        is_chat = rng.random() < 0.5
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        if rng.random() < 0.1:
            return self._input("text", request("POST", path, pick(rng, _TEXTS)), leaves=False)
        values = copy.deepcopy(CHAT if is_chat else COMPLETION)
        for name in list(values):
            if name not in ("messages", "prompt", "max_tokens") and rng.random() < 0.6:
                del values[name]
        if rng.random() < 0.4:
            values |= STREAMED
        if is_chat and rng.random() < 0.15:
            kind = "schema"
            schema = pick(rng, _SCHEMAS)
            values["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            }
        else:
            kind = "values"
            for _ in range(pick(rng, (0, 1, 1, 1, 1, 2, 3))):
                _spoil(rng, values)
        body = json.dumps(values).encode()
        leaves = kind != "schema" and (rng.random() < 0.1 or _num_choices(values) > 4)
        return self._input(kind, request("POST", path, body), leaves=leaves)

    def _input(self, kind: str, data: bytes, *, leaves: bool) -> Input:
        kind = f"JSON: {kind}{', left early' if leaves else ''}"
        return Input(kind, partial(self._ask, data, leaves=leaves))

    async def _ask(self, data: bytes, *, leaves: bool) -> Outcome:
        try:
            pipe = await Pipe.over_tcp(self._port)
        except ConnectionRefusedError as error:
            raise Violation("nobody listens any more") from error
        received = b""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await pipe.write(data)
                while more := await pipe.read():
                    received += more
                    if leaves:
                        break
        except TimeoutError as error:
            raise Violation(f"no answer in {_DEADLINE_S:g} s to {data[:1500]!r}") from error
        except OSError:
            pass
        finally:
            pipe.abort(reset=leaves)
        try:
            return classify(received)
        except Violation as violation:
            raise Violation(f"{violation}, which was {data[:1500]!r}") from violation


def _num_choices(values: dict[str, Any]) -> int:
    prompt, number = values.get("prompt"), values.get("n")
    num_prompts = len(prompt) if isinstance(prompt, list) else 1
    return num_prompts * (number if isinstance(number, int) else 1)


def _spoil(rng: Random, values: dict[str, Any]) -> None:
    """Change one value, wherever it is, or add or remove one."""
    where: Any = values
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        if not keys:
            return
        key = pick(rng, keys)
        inner = where[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            where = inner
            continue
        way = rng.random()
        if way < 0.75:
            where[key] = copy.deepcopy(pick(rng, _ODD_VALUES))
        elif way < 0.85:
            del where[key]
        elif isinstance(where, dict):
            where[pick(rng, ("", "unknown", "x" * 3000, "tools", "functions", "\0"))] = pick(
                rng, _ODD_VALUES
            )
        else:
            where.append(copy.deepcopy(inner))
        return
