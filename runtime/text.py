"""Tokens to a stream of text, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns tokens into text as they come, holding back what may still change.

    Held back: bytes that are not yet a whole character, and a tail that may grow into a stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """A stop string was met; nothing follows."""

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes, without the stop string or anything after it."""
        if self.stopped:
            return ""
        self._held += self._decode(token_id)
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            text, self._held = self._held[: min(ends)], ""
            return text
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Text still held back when no more tokens come."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token_id: int) -> str:
        """Text that is certain now."""
        try:
            return self._decoder.step(self._tokenizer, token_id) or ""
        except Exception:  # all that tokenizers raises
            # Bytes that are no text changed how what is out already would be read: begin anew.
            self._decoder = DecodeStream(skip_special_tokens=True)
            return self._decoder.step(self._tokenizer, token_id) or ""

    def _overlap(self, stop: str) -> int:
        """Length of the longest tail held that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
