"""What one answer took, as people and programs read it."""

from __future__ import annotations

from privatelora.runtime.generation import GenerationStats

Figures = dict[str, float]


def figures(stats: GenerationStats) -> Figures:
    """Speeds in tokens per second, times in seconds, sizes in bytes per decoded token."""
    decoded = max(stats.completion_tokens - 1, 1)
    traffic = stats.decode_traffic
    return {
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "completion_tokens": stats.completion_tokens,
        "time_to_first_token_s": round(stats.time_to_first_token_s, 4),
        "prefill_tokens_per_s": round(stats.prefill_tokens_per_s, 2),
        "decode_tokens_per_s": round(stats.decode_tokens_per_s, 2),
        "round_trips_per_token": round(traffic.round_trips / decoded, 2),
        "bytes_to_cloud_per_token": round(traffic.sent_nbytes / decoded, 1),
        "bytes_from_cloud_per_token": round(traffic.received_nbytes / decoded, 1),
    }


def figures_line(stats: GenerationStats) -> str:
    """The same in one line for a terminal."""
    shown = figures(stats)
    line = (
        f"{shown['completion_tokens']:.0f} tokens · first after "
        f"{shown['time_to_first_token_s']:.2f} s · {shown['decode_tokens_per_s']:.1f} tokens/s"
    )
    if stats.decode_traffic.round_trips:
        line += (
            f" · {shown['round_trips_per_token']:.0f} round trips, "
            f"{shown['bytes_to_cloud_per_token']:,.0f} bytes up and "
            f"{shown['bytes_from_cloud_per_token']:,.0f} down per token"
        )
    return line
