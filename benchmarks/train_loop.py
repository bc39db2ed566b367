"""Training as a whole, as `mlx-gpt train` does it: data, logging and all, but timed between two of its steps.

Of several ranks all are asked the same, and the first answers.
"""

import os
import time
from pathlib import Path
from typing import Any

from contender import resident_memory
from harness import Requests


def main() -> None:
    """Answer `start` when the first validation is over, and then each `run`, with its losses, when it is done."""
    from mlx_gpt.cli.terminal import Terminal  # mlx_gpt first, so that a tuned BLAS serves mlx
    from mlx_gpt.training import loop
    from mlx_gpt.training.setup import set_up

    import mlx.core as mx  # isort: skip

    asked = Requests()
    requests = iter(asked)
    _, arguments = next(requests)
    if arguments["device"] != "auto":
        mx.set_default_device(mx.gpu if arguments["device"] == "gpu" else mx.cpu)
    display = Terminal()
    os.chdir(Path(arguments["settings"]["out"]).parent)  # where the text is prepared, too
    facts: dict[str, Any] = {}
    losses: list[float] = []
    left, began = 1, time.perf_counter()

    def between_steps() -> bool:
        """Called by `loop.fit` after each step: goes on, or waits to be asked for more."""
        nonlocal left, began, facts
        left -= 1
        if left:
            return False
        mx.synchronize()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - began, "resident_memory": resident_memory(), **facts}
        mx.clear_cache()
        if run.ranks.first:
            asked.answer(answer | {"losses": losses.copy()})
        losses.clear()
        for _, more in requests:
            left, began = more["steps"], time.perf_counter()
            return False
        raise SystemExit  # no more is asked, and nothing has to be saved

    with set_up(arguments["settings"], display) as run:
        facts = {"vocab_size": run.config.model.vocab_size}
        run.monitor.listen(lambda record: losses.append(record["train_loss"]) if "train_loss" in record else None)
        loop.fit(run, display, between_steps)


if __name__ == "__main__":
    main()
