"""Sentei: making sparse attention safe to ship."""

__version__ = "0.1.0"
