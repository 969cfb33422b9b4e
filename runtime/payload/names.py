"""Names of the payload codecs, apart from the code so that settings can be checked without it."""

UNCOMPRESSED_NAMES = ("fp32", "fp16", "bf16", "int12", "int10", "fp8", "int8", "int6", "int4")
"""Widest numbers first."""
LZ4_SUFFIX = "+lz4"

CODEC_NAMES: tuple[str, ...] = (
    *UNCOMPRESSED_NAMES,
    *(name + LZ4_SUFFIX for name in UNCOMPRESSED_NAMES),
)
"""Codecs that this installation can encode and decode: widest numbers first, then the same
again with lz4. ``runtime/payload/codec.py`` says what they are."""
