"""Names of the payload codecs, apart from the code so that settings can be checked without it."""

CODEC_NAMES: tuple[str, ...] = ("fp16", "bf16", "fp32")
"""Codecs that this installation can encode and decode, smallest first."""
