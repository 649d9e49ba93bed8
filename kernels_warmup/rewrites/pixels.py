"""The last operations on an image before it leaves the device: conversion and a check."""

from __future__ import annotations

import torch


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """The decoder's output in -1..1 (batch, 3, height, width) as uint8 (batch, height, width, 3).

    The result equals that of diffusers' own post-processing. It is computed on the device, so only
    one byte per value is copied to the host, and in float32, because bfloat16 could represent only
    every other grey.
    """
    scaled = (image.float() * 0.5 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def all_finite(images: torch.Tensor) -> torch.Tensor:
    """Whether all values of each image are finite: (images,) bool, on their device.

    Read it after the run's last copy, because reading it waits for the GPU.
    """
    return images.isfinite().flatten(1).all(1)
