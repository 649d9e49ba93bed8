"""The parameters of a training run of the demo model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """How long a phase lasts: steps, seconds, or both, whichever is reached first."""

    steps: int | None
    seconds: float | None

    def progress(self, step: int, seconds: float) -> float:
        """From 0 to 1."""
        shares = [
            done / bound
            for done, bound in ((step, self.steps), (seconds, self.seconds))
            if bound is not None
        ]
        return min(1.0, max(shares))


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that determines the trained weights."""

    seed: int
    scenes: int
    vae: Limit
    vae_batch: int
    diffusion: Limit
    diffusion_batch: int
    vae_rate: float = 1e-3
    """Peak learning rate."""
    diffusion_rate: float = 1e-3
    vae_decay: float = 0.998
    """Decay of the averaged weights, a step."""
    diffusion_decay: float = 0.9995
