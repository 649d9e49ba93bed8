"""Ways to compute SDXL's result with less work, one per file.

Each changes diffusers' modules in place and changes the result by rounding at most. Names, weights
and `isinstance` stay as they are: a module becomes its counterpart by its class alone. A module
that is not SDXL's raises ValueError instead of being computed in part.

- `text_once`: the prompt's keys, values and added condition once a run, not once a step.
- `time_once`: the step's embedding projected for all residual blocks by one product.
- `zero_text`: no attention to the text for the half of the batch whose text is zero.
- `group_norm`: group norms by reductions along the channels, for channels_last.
- `upsampling`: the convolution before the upsampling instead of after it.
- `vae_attention`: the VAE's one wide head as two products in the model's own type.
- `prepared_loop`: diffusers' pipeline without the work it repeats before every loop.
- `pixels`: the image converted, and checked, on the device.

`recipes.WAYS` says which of them a GPU has measured, and the bench has a scenario for each.
"""
