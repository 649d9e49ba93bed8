"""The model card that is written with the trained checkpoint."""

from typing import Any

from bench.demo_model.evaluate import as_table
from bench.demo_model.losses import DROPPED
from bench.demo_model.scenes import words_by_kind
from bench.demo_model.training_data import CAPTIONS_PER_SCENE
from bench.demo_model.training_plan import TrainingPlan
from serve.demo_model import DEMO_SIZES


def card(plan: TrainingPlan, metrics: dict[str, Any]) -> str:
    """The model card in Markdown; `metrics` as `train` returns them."""
    sizes = " and ".join(f"{width}x{height}" for width, height in DEMO_SIZES)
    words = "\n".join(f"- {kind}: {words}." for kind, words in words_by_kind().items())
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny SDXL that draws shapes

Every part of SDXL, each small: two CLIP text encoders, a UNet with text-time conditioning, a VAE
of factor 8, SDXL's scheduler. It draws one or two flat shapes on a plain background and knows
nothing else. Its sizes are {sizes} (width x height).
It is the default model of stepspan without a GPU.

## Words it understands

{words}
- "background" after a colour makes it the background's.

Any other prompt is accepted and gives a picture of some scene.

## Data

{plan.scenes:,} procedural scenes with {CAPTIONS_PER_SCENE} captions each, drawn by \
`bench/demo_model/scenes.py`;
no photograph, no person, nothing from the web. A tenth of all combinations of size, colour, shape,
place and background was held out; the figures are about those.

## Figures

{as_table(metrics["figures"])}

Taken on {metrics["device"]} by `python -m bench.demo_model.evaluate`: 20 steps, guidance 5,
fixed seeds. A share counts the pictures in which a small classifier reads from the pixels what the
prompt asked for; with two objects both must be right.

## Training

`python -m bench.demo_model.train --out DIR` with seed {plan.seed} on {metrics["device"]}:

- VAE: {metrics["vae_steps"]:,} steps of {plan.vae_batch} pictures in \
{metrics["vae_seconds"]:.0f} s.
- Text encoders and UNet together: {metrics["diffusion_steps"]:,} steps of \
{plan.diffusion_batch:,} in {metrics["diffusion_seconds"]:.0f} s.

Epsilon prediction, SDXL's beta schedule, prompts dropped in {DROPPED:.0%} of the samples,
averaged weights, float16 on disk.
"""
