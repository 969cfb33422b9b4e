"""A program of somebody else's: asks an edge over HTTP with the official OpenAI client.

    -> {"prompt_ids": [100, 107, ...], "tokens": 48}
    <- {"event": "answered", "first_token_s": 0.3, "seconds": 1.2, "tokens": 48}

``seconds``: from the first piece of text to the last. The address is the argument.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Answer requests until standard input ends."""
    import openai

    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="unused", max_retries=0)
    print(json.dumps({"event": "ready"}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        times = []
        tokens = 0
        started = time.perf_counter()
        stream = client.completions.create(
            model="adapter",
            prompt=request["prompt_ids"],
            max_tokens=request["tokens"],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            elif chunk.choices[0].text:
                times.append(time.perf_counter())
        result = {
            "event": "answered",
            "first_token_s": times[0] - started,
            "seconds": times[-1] - times[0],
            "tokens": tokens,
        }
        print(json.dumps(result), flush=True)
    client.close()


if __name__ == "__main__":
    main()
