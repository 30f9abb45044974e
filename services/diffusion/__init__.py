"""Diffusion service: hidden states become a PNG. It owns DiT, VAE, the fitting of embeddings and the order of work.

It never knows prompts.
"""
