"""Decoder families: their configuration and tensor names."""
