"""A server for models: OpenAI's API for programs, and a web page for people."""

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place
