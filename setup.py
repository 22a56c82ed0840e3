"""Packaging (being written)."""
