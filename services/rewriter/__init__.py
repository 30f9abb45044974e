"""Rewriter service: makes a short prompt longer with a language model. It owns sampling and `<think>` parsing.

It never touches embeddings and knows no templates: the system prompt comes with the request.
"""
