"""The SDXL model: loading it, encoding text, denoising and decoding."""
