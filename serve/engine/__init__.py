"""From a validated request to its image: admission, the GPU thread, start-up."""
