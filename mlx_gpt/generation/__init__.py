"""Generates text from a prompt."""

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place
