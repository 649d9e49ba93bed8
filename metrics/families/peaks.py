"""The rated peak of GPUs: the 100% of utilisation.

Dense bf16 with float32 accumulation, in FLOPs a second, from NVIDIA's data sheets. If a sheet gives
the rate with sparsity only, half of it. A large matrix product reaches 70 to 80 percent of the peak
under the power limit, and no model reaches more.
"""

from __future__ import annotations

TERA = 10**12

# The first entry that NVML's name of the GPU contains is used, so specific names come first.
# Sources: the product's data sheet, or the architecture's white paper for GeForce.
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

# These have the full GPU's name and are slower: a slice, a laptop's GPU, an export version.
_LESS_THAN_THE_NAME = ("MIG", "Laptop", "Max Q", "RTX 4090 D", "RTX 5090 D")


def peak_flops(gpu_name: str, stated_tflops: float | None = None) -> float | None:
    """FLOPs a second: the operator's value, else the GPU's rating, else None.

    Args:
        gpu_name: NVML's name, such as `NVIDIA H100 80GB HBM3`; empty without a GPU.
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
