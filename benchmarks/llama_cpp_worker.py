"""llama.cpp in a process of its own: ``... llama_cpp_worker GGUF THREADS PROMPT_TOKENS TOKENS``.

    <- {"event": "decoded", "times": [0.12, 0.15, ...]}

It computes with the weights as the file has them, in 4 or 8 bits where others here use 16.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Decode greedily, end-of-sequence like any other token, and print the moments of tokens."""
    from llama_cpp import Llama  # type: ignore[import-not-found,unused-ignore]

    gguf, *counts = sys.argv[1:]
    num_threads, prompt_tokens, num_tokens = map(int, counts)
    model = Llama(
        model_path=gguf, n_ctx=prompt_tokens + num_tokens, n_threads=num_threads, verbose=False
    )
    prompt = [100 + 7 * i % 1000 for i in range(prompt_tokens)]
    times = []
    for _ in model.generate(prompt, temp=0.0):
        times.append(time.monotonic())
        if len(times) == num_tokens:
            break
    print(json.dumps({"event": "decoded", "times": times}), flush=True)


if __name__ == "__main__":
    main()
