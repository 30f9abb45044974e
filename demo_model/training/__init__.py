"""Trains the demo model, one stage after the other: tokenizer, VAE, text model and DiT together, vision."""
