"""Vision-language service: a reference picture becomes hidden states. It owns Qwen3-VL and the limits on pictures.

It never blends, keeps nothing of what it has seen, and fetches no URL.
"""
