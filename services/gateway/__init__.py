"""Gateway: the public API. It owns validation, templates, the formatting of prompts and the order of calls.

It never imports torch, numpy or PIL and never computes on tensors: their bytes pass through it unread.
"""
