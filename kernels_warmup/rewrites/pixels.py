"""The last operations on an image before it leaves the device: conversion and a check."""

from __future__ import annotations

import torch


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """The decoder's output in -1..1 (batch, 3, height, width) as uint8 (batch, height, width, 3).

    On the device, so that a quarter of the bytes cross to the host; float32, so that bfloat16
    does not round to every other grey. Same result as diffusers' own post-processing.
    """
    scaled = (image.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def all_finite(images: torch.Tensor) -> torch.Tensor:
    """(images,) bool on their device; read it after the run's last copy, not before."""
    return images.isfinite().flatten(1).all(1)
