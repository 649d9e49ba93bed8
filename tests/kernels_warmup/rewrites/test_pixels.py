import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from kernels_warmup.rewrites.pixels import all_finite, to_pixels


def test_pixels_equal_those_of_diffusers() -> None:
    image = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(7))
    image[0, 0, 0, :3] = torch.tensor([-1.0, 1.0, 1 / 255])
    pixels = to_pixels(image)
    expected = VaeImageProcessor().postprocess(image, output_type="pil")
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    for got, want in zip(pixels.numpy(), expected, strict=True):
        np.testing.assert_array_equal(got, np.asarray(want))


def test_one_value_that_is_not_finite_is_found() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    assert bool(all_finite(latents))
    latents[0, 3, 7, 7] = float("nan")
    assert not bool(all_finite(latents))
    latents[0, 3, 7, 7] = float("-inf")
    assert not bool(all_finite(latents))
