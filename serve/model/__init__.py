"""SDXL: loading it, and text, denoising and decoding on it."""
