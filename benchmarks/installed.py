"""Ends a benchmark with one sentence where mlx-gpt is missing.

Programs import it before any other package, because without mlx-gpt those it depends on are usually missing too.
"""

import importlib.util
import sys

if any(importlib.util.find_spec(package) is None for package in ("mlx_gpt", "click", "numpy")):
    sys.exit("mlx-gpt is not installed for this Python: run `pip install -e '.[bench]'` in the project's folder.")
