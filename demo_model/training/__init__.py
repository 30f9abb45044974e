"""Trains the demo model stage by stage: VAE, text, facts, text and DiT together, vision, drawing, guidance."""
