"""Decoder stack, exchange, wire format, generation and the two daemons."""
