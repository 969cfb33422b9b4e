"""Requests that no server should answer, with the status and a word of the error they get.

Shared by the tests in one process and those over real daemons.
"""

from __future__ import annotations

import json
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

CHAT_BODIES: dict[str, tuple[Any, str | None, str]] = {
    "no messages": ({}, "messages", "Field required"),
    "empty messages": ({"messages": []}, "messages", "at least 1 item"),
    "messages a string": ({"messages": "Hello"}, "messages", "valid list"),
    "a message a string": ({"messages": ["Hello"]}, "messages[0]", "valid dictionary"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role", "Field required"),
    "role of a tool": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].role",
        "'system', 'developer', 'user' or 'assistant'",
    ),
    "content null": (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content",
        "valid string",
    ),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", ""),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]},
        "messages[0].content[1]",
        "reads text only",
    ),
    "a text part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0]",
        "needs its text",
    ),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "a\\ud800"}]}',
        "messages[0].content",
        "not valid Unicode at character 2",
    ),
    "a null character": (
        {"messages": [{"role": "user", "content": "a\0b"}]},
        "messages[0].content",
        "null characters",
    ),
    "tools": ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "not supported"),
    "functions": ({"messages": HELLO, "functions": [{}]}, "functions", "not supported"),
    "audio": ({"messages": HELLO, "modalities": ["text", "audio"]}, "modalities", "text only"),
    "temperature a string": ({"messages": HELLO, "temperature": "1"}, "temperature", "number"),
    "temperature below 0": ({"messages": HELLO, "temperature": -1}, "temperature", "greater"),
    "temperature infinite": (
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        "temperature",
        "less than or equal to 2",
    ),
    "top_p of 0": ({"messages": HELLO, "top_p": 0}, "top_p", "greater than 0"),
    "n of 0": ({"messages": HELLO, "n": 0}, "n", "greater than or equal to 1"),
    "n too large": ({"messages": HELLO, "n": 10**30}, "n", ""),
    "n a bool": ({"messages": HELLO, "n": True}, "n", "integer"),
    "max_tokens 0": ({"messages": HELLO, "max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens a float": ({"messages": HELLO, "max_tokens": 1.5}, "max_tokens", "integer"),
    "max_completion_tokens 0": (
        {"messages": HELLO, "max_completion_tokens": 0},
        "max_completion_tokens",
        "greater",
    ),
    "seed too large": ({"messages": HELLO, "seed": 2**64}, "seed", "less than"),
    "too many stops": ({"messages": HELLO, "stop": ["a"] * 17}, "stop", "at most 16"),
    "stop a number": ({"messages": HELLO, "stop": 5}, "stop", "valid string"),
    "stop of numbers": ({"messages": HELLO, "stop": ["a", 5]}, "stop[1]", "valid string"),
    "bias of no token": ({"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    "bias of a token that is not": (
        {"messages": HELLO, "logit_bias": {"999999": 1}},
        "logit_bias",
        "token ids lie in 0 to",
    ),
    "bias too large": ({"messages": HELLO, "logit_bias": {"5": 101}}, "logit_bias", "100"),
    "top_logprobs alone": ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs", "logprobs"),
    "top_logprobs too many": (
        {"messages": HELLO, "logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "20",
    ),
    "logprobs a number": ({"messages": HELLO, "logprobs": 5}, "logprobs", "boolean"),
    "penalty too large": ({"messages": HELLO, "presence_penalty": 3}, "presence_penalty", "2"),
    "stream a string": ({"messages": HELLO, "stream": "yes"}, "stream", "boolean"),
    "stream_options alone": (
        {"messages": HELLO, "stream_options": {"include_usage": True}},
        "stream_options",
        "stream: true",
    ),
    "an unknown format": (
        {"messages": HELLO, "response_format": {"type": "xml"}},
        "response_format.type",
        "json_object",
    ),
    "a format without its schema": (
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
        "response_format",
        "json_schema",
    ),
    "a schema of no type": (
        {
            "messages": HELLO,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "yes"}}},
        },
        "response_format",
        "cannot be followed",
    ),
    "a model that is a number": ({"messages": HELLO, "model": 5}, "model", "valid string"),
    "a prompt too long": (
        {"messages": [{"role": "user", "content": "letters " * 5000}]},
        "messages",
        "no room is left for an answer; shorten the prompt",
    ),
}

COMPLETION_BODIES: dict[str, tuple[Any, str | None, str]] = {
    "no prompt": ({}, "prompt", "Field required"),
    "prompt null": ({"prompt": None}, "prompt", ""),
    "empty prompt": ({"prompt": ""}, "prompt", "no tokens"),
    "no prompts": ({"prompt": []}, "prompt", "at least 1 item"),
    "one prompt without tokens": ({"prompt": [[5], []]}, "prompt", "no tokens"),
    "mixed prompts": ({"prompt": ["a", 5]}, "prompt[1]", "valid list"),
    "a token below 0": ({"prompt": [-1]}, "prompt[0][0]", "greater than or equal to 0"),
    "a token that is not": ({"prompt": [5, 10**6]}, "prompt", "token ids lie in 0 to"),
    "a token beyond all integers": ({"prompt": [10**40]}, "prompt[0][0]", "less than"),
    "too many prompts": ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
    "half a surrogate pair": (
        b'{"prompt": "\\udc00"}',
        "prompt[0]",
        "not valid Unicode at character 1",
    ),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of", "not supported"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    "max_tokens 0 without echo": ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
    "logprobs a bool": ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
    "a prompt too long": ({"prompt": [5] * 5000}, "prompt", "shorten the prompt"),
}

DEEP = b"[" * 100_000
NOT_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON at line 1"),
    "no JSON": (b"{prompt: 1}", "not JSON at line 1, column 2"),
    "cut off": (b'{"prompt": "a', "not JSON at line 1"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', "not UTF-8 at byte 15"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "a raw null character": (b'{"prompt": "a\0"}', "not JSON at line 1, column 14"),
    "only null characters": (b"\0" * 100, "not JSON"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "NaN is no number there"),
    "infinity": (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is no number there"),
    "too many digits": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "too many digits"),
    "nested too deeply": (DEEP, "nested too deeply"),
    "an object nested too deeply": (b'{"prompt": ' + DEEP + b"]" * 100_000 + b"}", "too deeply"),
    "a list": (b"[1, 2]", "must be a JSON object"),
    "a string": (b'"Hello"', "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
}

HEAD = b"Host: localhost\r\n"
GOOD = json.dumps({"prompt": "a", "max_tokens": 1}).encode()


def _post(*headers: bytes, body: bytes = GOOD, target: bytes = b"/v1/completions") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST " + target + b" HTTP/1.1\r\n" + HEAD + lines + b"\r\n" + body


RAW: dict[str, tuple[bytes, int]] = {
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "no version": (b"GET /v1/models\r\n\r\n", 400),
    "a space in the target": (b"GET /v1/ models HTTP/1.1\r\n" + HEAD + b"\r\n", 400),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /v1/models HTTP/1.1\r\n" + HEAD * 2 + b"\r\n", 400),
    "a header without a colon": (b"GET / HTTP/1.1\r\n" + HEAD + b"oops\r\n\r\n", 400),
    "a null character in a header": (b"GET / HTTP/1.1\r\n" + HEAD + b"X: a\0b\r\n\r\n", 400),
    "a huge header": (b"GET / HTTP/1.1\r\n" + HEAD + b"X: " + b"a" * 500_000 + b"\r\n\r\n", 431),
    "very many headers": (b"GET / HTTP/1.1\r\n" + HEAD + b"X: a\r\n" * 20_000 + b"\r\n", 431),
    "a huge target": (b"GET /" + b"a" * 500_000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n", 431),
    "a length that is no number": (_post(b"Content-Length: ten"), 400),
    "a length below 0": (_post(b"Content-Length: -1"), 400),
    "two lengths": (_post(b"Content-Length: 1", b"Content-Length: 2"), 400),
    "a huge length": (_post(b"Content-Length: 99999999999"), 413),
    "a length beyond all integers": (_post(b"Content-Length: " + b"9" * 4000), 400),
    "an unknown transfer encoding": (_post(b"Transfer-Encoding: gzip"), 501),
    "a chunk of no size": (_post(b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), 400),
    "a compressed body": (_post(b"Content-Encoding: gzip", b"Content-Length: 0", body=b""), 415),
    "an unknown path": (b"GET /v2/models HTTP/1.1\r\n" + HEAD + b"\r\n", 404),
    "a path out of the root": (b"GET /../../etc/passwd HTTP/1.1\r\n" + HEAD + b"\r\n", 404),
    "an unknown method": (b"BREW /v1/models HTTP/1.1\r\n" + HEAD + b"\r\n", 405),
    "the wrong method": (b"GET /v1/completions HTTP/1.1\r\n" + HEAD + b"\r\n", 405),
    "deleting a model": (b"DELETE /v1/models/base HTTP/1.1\r\n" + HEAD + b"\r\n", 405),
    "another host": (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    "another origin": (
        _post(b"Origin: http://evil.example", b"Content-Length: %d" % len(GOOD)),
        403,
    ),
    "no origin": (_post(b"Origin: null", b"Content-Length: %d" % len(GOOD)), 403),
}
"""Bytes on the socket, and the status they get."""
