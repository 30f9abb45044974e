"""Encoder service: text becomes the hidden states of Qwen3. It owns the tokenizer, the weights and the batching.

It never knows templates, users or pictures.
"""
