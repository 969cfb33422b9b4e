"""The same questions to an adapter that is served: does it answer as it did when it was trained?"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from privatelora.errors import ConfigError
from privatelora.training.data.config import EncodingConfig
from privatelora.training.data.examples import Example
from privatelora.training.data.scoring import Score, score_answers

NUM_AT_ONCE = 4
TIMEOUT_S = 300.0


def score_served(
    url: str,
    examples: Sequence[Example],
    *,
    settings: EncodingConfig,
    max_new_tokens: int,
    model: str | None = None,
    api_key: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Ask greedily through OpenAI's chat API at ``url`` (such as http://127.0.0.1:18231/v1).

    ``model``: the name of the adapter there; default: the server's own choice. Raises ConfigError
    if there is no such server, or it refuses.
    """
    if settings.render != "chat":
        raise ConfigError("a server is asked in chats; this run's data say render: text")
    answers = []
    ask = partial(_ask, url, settings, max_new_tokens, model, api_key)
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        for answer in pool.map(ask, examples):
            answers.append(answer)
            progress(len(answers), len(examples))
    return score_answers(answers, examples)


def _ask(
    url: str,
    settings: EncodingConfig,
    max_new_tokens: int,
    model: str | None,
    api_key: str | None,
    example: Example,
) -> str:
    turns = [{"role": turn.role, "content": turn.content} for turn in example.prompt]
    if settings.system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": settings.system})
    body: dict[str, Any] = {"messages": turns, "temperature": 0, "max_tokens": max_new_tokens}
    if model is not None:
        body["model"] = model
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        request = urllib.request.Request(
            f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} refuses: {_reason(error)}") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{url} does not answer as OpenAI's API does: {reason}") from error
    return str(answer).strip()


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
