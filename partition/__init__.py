"""Reads checkpoints, decides which tensor lives where, writes shards and adapters."""
