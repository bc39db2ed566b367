"""The program that the ranks of test_distributed.py run: it calls a function of this file with arguments.

A rank works in the folder `host<rank>` if there is one, as if it had a host to itself.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

RANK = os.environ["MLX_RANK"]


def cli(*arguments):
    """The command line."""
    from mlx_gpt.cli import run

    Path(f"{RANK}.pid").write_text(str(os.getpid()))
    if (host := Path(f"host{RANK}")).exists():
        os.chdir(host)
    sys.exit(run([*arguments]))


def train(request):
    """Train, and print what this rank holds at the end."""
    from mlx.utils import tree_flatten

    from mlx_gpt.progress import Lines
    from mlx_gpt.training import loop

    fit = loop.fit

    def fit_and_report(run, step, optimizer, *rest):
        outcome = fit(run, step, optimizer, *rest)
        arrays = tree_flatten((run.model.parameters(), optimizer.state))
        bits = hashlib.sha256(b"".join(bytes(memoryview(array)) for _, array in arrays)).hexdigest()
        print(json.dumps([run.ranks.rank, bits, outcome.step, outcome.best_loss]), flush=True)
        return outcome

    loop.fit = fit_and_report
    settings, resume = json.loads(request)
    loop.train(settings, Lines(), resume=resume)


def exchange():
    """Exchange everything that can be exchanged, and print what arrived."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from mlx_gpt import distributed
    from mlx_gpt.device import device

    def prepare():
        if not (prepared := Path("prepared")).exists():
            prepared.write_text(f"prepared by rank {rank}")
        return prepared.read_text()

    def bits(arrays):
        return {name: array.flatten().view(mx.uint8).tolist() for name, array in arrays.items()}

    distributed.MESSAGE = 16  # so that there are several
    with distributed.join() as ranks:
        device().share_host(ranks.number_here, ranks.here)
        rank = ranks.rank
        original = {
            "float": mx.array([0x80000000, 0x7FC12345, 1], mx.uint32).view(mx.float32),  # -0.0, a NaN, a subnormal
            "half": mx.array([-0.0, 1.5], mx.bfloat16),
            "step": mx.array(2**40, mx.uint64),
            "flags": mx.array([[True], [False]]),
        }
        summed = {
            "half": mx.array([rank, rank + 1], mx.bfloat16),
            "one": mx.array(float(rank)),
            "long": mx.array([0.5 * rank] * 3),
            "whole": mx.array([rank * 2**40], mx.int64),
        }
        result = {
            "here": ranks.here,
            "broadcast": ranks.broadcast({"word": "naïve 鳥", "numbers": [0.1, None]} if ranks.first else None),
            "total": ranks.total([0.1, 1e16, 3.0, -1e16][rank], rank),
            "any": [ranks.any(rank == 2, False), ranks.any(False, False)],
            "sum": {name: array.tolist() for name, array in ranks.sum(summed).items()},
            "copy": bits(ranks.copy(original if ranks.first else tree_map(mx.zeros_like, original))),
            "original": bits(original),
            "in_turns": ranks.in_turns(prepare),
            "launcher_idles": not hasattr(os, "SCHED_IDLE") or os.sched_getscheduler(os.getppid()) == os.SCHED_IDLE,
            "kernels": os.environ.get("TMPDIR"),
        }
        print(json.dumps(result), flush=True)


def wait():
    """Wait for rank 1, which does not answer."""
    from mlx_gpt.distributed import join
    from mlx_gpt.signals import StopSignals

    with join() as ranks:
        if ranks.first:
            with StopSignals():
                Path("0.pid").write_text(str(os.getpid()))
                Path("waits").touch()
                ranks.total()
        time.sleep(1000)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
