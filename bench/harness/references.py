"""What a loaded scenario is compared with: a float32 forward pass, and its nominal FLOPs.

torch is imported inside functions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.harness.result_file import Flops
from bench.harness.torch_state import release_memory

if TYPE_CHECKING:
    import torch

    from bench.harness.drive import LoadedScenario
    from bench.harness.work import Work
    from kernels_warmup.numerical_error import StepInputs


class References:
    """One UNet forward pass in float32 arithmetic for each dtype of the weights."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._by_dtype: dict[str, tuple[StepInputs, torch.Tensor]] = {}

    def error(self, scenario: LoadedScenario, dtype: str) -> float | None:
        """Relative error of one forward pass of the scenario; None if it is not finite."""
        from kernels_warmup.numerical_error import forward_once, relative_error
        from kernels_warmup.rewrites.zero_text import takes_zero_text

        inputs, reference = self.of(dtype)

        def once(pipeline: Any) -> torch.Tensor:
            unet = pipeline.unet
            zero_text = takes_zero_text(unet)
            return forward_once(unet, inputs.cast(unet.dtype), zero_text=zero_text).clone()

        error = relative_error(scenario.with_pipeline(once), reference)
        return error if math.isfinite(error) else None

    def of(self, dtype: str) -> tuple[StepInputs, torch.Tensor]:
        """Seeded inputs, and the float32 forward pass on them with weights rounded to `dtype`."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = self._compute(dtype)
            release_memory()
        return self._by_dtype[dtype]

    def _compute(self, dtype: str) -> tuple[StepInputs, torch.Tensor]:
        import torch

        from kernels_warmup.numerical_error import StepInputs, forward_once
        from serve.model.loading import load_model

        work = self._work
        unet = load_model(work.model, None, work.device, dtype).pipeline.unet.float()
        device = torch.device(work.device)
        # Drawn in bfloat16, the narrowest type, so that every scenario gets the same numbers.
        # Without a negative prompt, because the timed requests have none.
        drawn = StepInputs.draw(unet, work.shape, 1, device, torch.bfloat16)
        inputs = drawn.without_negative()
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with torch.no_grad():
                return inputs, forward_once(unet, inputs.cast(torch.float32))
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def count_flops(scenario: LoadedScenario, work: Work, images: int) -> Flops:
    """Nominal FLOPs of one run, from the configurations of the loaded models."""
    from kernels_warmup.flops import count_run

    counted = scenario.with_pipeline(
        lambda pipeline: count_run(pipeline, work.shape, guidance=True, images=images)
    )
    return Flops(counted.text_encode, counted.step, counted.vae_decode)
