"""LoRAs that requests may use: finding their files, reading them, and changing the weights.

- `sources`: from a source in `SDXL_LORAS` to a file on this machine.
- `naming`: from a key of a file to a module of the model.
- `files`: reading a file, and checking it against the model.
- `in_place`: changing the model's weights in place, and changing them back.
"""
