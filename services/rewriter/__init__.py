"""Rewriter service: makes a short prompt longer with a language model. It owns sampling and `<think>` parsing.

It never touches embeddings. This package only keeps its place: the service itself is not written yet.
"""
