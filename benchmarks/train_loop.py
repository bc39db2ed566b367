"""Training as a whole: `mlx_gpt.training.loop.train`, timed between two of its steps.

If there are several ranks, all receive each request, and the first one answers.
"""

import os
import time
from pathlib import Path
from typing import Any

from contender import choose_device, resident_memory
from harness import Requests


def main() -> None:
    """Answer `start` after the first step, and each `run` after as many steps as it asks for, with their losses."""
    answers = Requests()
    requests = iter(answers)
    _, arguments = next(requests)
    choose_device(arguments["device"])
    from mlx_gpt.cli.terminal import Terminal
    from mlx_gpt.distributed import is_first
    from mlx_gpt.models import vocab_size
    from mlx_gpt.progress import Lines
    from mlx_gpt.training.loop import train
    from mlx_gpt.training.metrics import read_records

    import mlx.core as mx  # isort: skip

    folder = Path(arguments["settings"]["out"])
    os.chdir(folder.parent)  # where the text is prepared as well
    facts: dict[str, Any] = {}
    left, reported, began = 1, 0, time.perf_counter()

    def note_size(model: Any) -> Any:
        facts["vocab_size"] = vocab_size(model)
        return model

    def wait_for_request() -> bool:
        """Called after each step: once all have been made, answer and wait for the next request."""
        nonlocal left, reported, began
        left -= 1
        if left:
            return False
        mx.synchronize()
        seconds = time.perf_counter() - began
        mx.clear_cache()
        if is_first():
            losses = [record["train_loss"] for record in read_records(folder) if "learning_rate" in record]
            measured = {"seconds": seconds, "losses": losses[reported:], "resident_memory": resident_memory()}
            answers.answer(facts | measured)
            reported = len(losses)
        for _, request in requests:
            left, began = request["steps"], time.perf_counter()
            return False
        raise SystemExit  # there is no further request, and nothing to save

    display = Terminal() if is_first() else Lines()
    train(arguments["settings"], display, stop_requested=wait_for_request, network=note_size)


if __name__ == "__main__":
    main()
