"""Makes the model fast and warm. Knows torch; knows neither HTTP nor settings.

- `recipes`: what each compile mode does, as data. `compile`: applies a recipe to a pipeline.
- `rewrites/`: ways to compute the same with less work, one per file.
- `triton/`: kernels of our own for Hopper.
- `attention`, `quantize`, `fp8`: attention backends and lossy arithmetic, by name.
- `cuda_graphs`, `forwards`: what runs when the pipeline calls the compiled UNet, decoder or text
  encoders.
- `warmup`, `shapes`, `cache/`: which image sizes are warm, and how a start gets there.
- `flops`, `numerical_error`: how much work a run is, and how far a change moves its result.

A function named `why_unusable`, in whichever module, returns one sentence that says why the thing
named by its arguments cannot run here, or None if it can.
"""
