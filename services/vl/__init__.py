"""Vision-language service: a reference picture becomes hidden states. It owns Qwen3-VL and the limits on pictures.

It never blends. This package only keeps its place: the service itself is not written yet.
"""
