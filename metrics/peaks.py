"""What GPUs are rated for: the one figure that utilisation is a share of.

Dense bf16 with float32 accumulation, in FLOPs a second, from NVIDIA's data sheets; where a sheet
gives the rate with sparsity only, half of it. Rated and not reached: a large matrix product gets 70
to 80 percent of it under the power limit, and no model more.
"""

from __future__ import annotations

TERA = 10**12

# Matched against NVML's name for the GPU, the first that it contains; the particular before the
# general. Sources: the product's data sheet, or the architecture's white paper for GeForce.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500),
    ("B200", 2250),
    ("GH200", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),  # SXM: "H100 80GB HBM3"
    ("A100", 312),
    ("A30", 165),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX 6000 Ada", 364),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX A6000", 154.8),
    ("A40", 149.7),
    ("A10", 125),
    ("RTX 3090", 71),
)

# Named like the whole GPU and slower than it: a slice, and what a laptop or an export rule allows.
_LESS_THAN_THE_NAME = ("MIG", "Laptop", "Max Q", "RTX 4090 D", "RTX 5090 D")


def peak_flops(gpu_name: str, stated_tflops: float | None = None) -> float | None:
    """FLOPs a second: what the operator stated, else what the GPU is rated for, else None.

    Args:
        gpu_name: as NVML tells it, like `NVIDIA H100 80GB HBM3`; empty where there is no GPU.
        stated_tflops: `SDXL_PEAK_TFLOPS`.
    """
    if stated_tflops is not None:
        return stated_tflops * TERA
    words = f" {gpu_name.replace('-', ' ')} "  # whole words: `L4` is not `L40`
    if any(f" {name} " in words for name in _LESS_THAN_THE_NAME):
        return None
    for name, tflops in _PEAK_TFLOPS:
        if f" {name} " in words:
            return tflops * TERA
    return None
