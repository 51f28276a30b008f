"""Exact, fast, compilable attention for transformers models."""

__version__ = "0.1.0"
