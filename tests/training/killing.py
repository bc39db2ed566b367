"""Kill training at random moments, resume it, and compare with a run that was left alone.

    python -m tests.training.killing --runs 50 [--model-type qwen3 --optimizer muon ...]

Any other flag is one of `mlx-gpt train`, for all runs. With `--from=base` they start from a run that is made first.

Each run is killed with SIGKILL several times, inside saves and evaluations too, and resumed. It must end with the same
bytes of weights and optimizer as an undisturbed run, and with the same metrics except for times and memory.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers.models import BPE

from mlx_gpt.token_bytes import BYTE_OF
from mlx_gpt.tokenizer_training import byte_level

COMMAND = [
    sys.executable, "-c", "import sys; from mlx_gpt.cli import run; sys.exit(run(sys.argv[1:]))", "train",
]  # fmt: skip
SETTINGS = {
    "tokenizer": "bytes", "preset": "tiny", "n-layer": 1, "n-head": 2, "n-embd": 32, "n-positions": 16, "seq-len": 16,
    "batch-size": 4, "gradient-accumulation-steps": 2, "dropout": 0.1, "max-steps": 30, "max-minutes": 60,
    "warmup-steps": 5, "log-every": 1, "eval-every": 3, "save-every": 2, "eval-windows": 8,
}  # fmt: skip
CLOCK = ("seconds", "started", "tokens_per_second", "peak_memory_gb")


def outcome(run: Path) -> dict[str, object]:
    """Everything that must be equal: the bytes of weights, sizes and optimizer, and metrics except times and memory."""
    files = [run / "final/model.safetensors", run / "best/model.safetensors"]
    files += [run / "final/config.json", run / "best/config.json"]
    files += sorted((run / "checkpoints").glob("*/*.safetensors"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files} | {
        "metrics": [{name: value for name, value in record.items() if name not in CLOCK} for record in metrics]
    }


def train(folder: Path, run: str, further: Sequence[str] = (), seconds: float | None = None) -> tuple[bool, float]:
    """Begin or resume a run, and kill it after so many seconds.

    Args:
        further: flags in addition to `SETTINGS`.

    Returns whether it ended by itself, and how long it took.
    """
    flags = [*(f"--{name}={value}" for name, value in SETTINGS.items()), *further]
    arguments = (
        ["--resume", run] if (folder / run / "run.toml").exists() else ["--data", "text.txt", "--out", run, *flags]
    )
    started = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, time.perf_counter() - started
    if process.returncode:
        raise AssertionError(f"{run} ended with {process.returncode}:\n{output[-2000:]}")
    return True, time.perf_counter() - started


def compare(folder: Path, runs: int, kills: int, seed: int, further: Sequence[str] = ()) -> list[str]:
    """Make one straight run and `runs` that are killed `kills` times each; the names of those that differ."""
    draw = random.Random(seed)
    words = [f"word{n} " for n in range(400)]
    (folder / "text.txt").write_text("".join(draw.choices(words, k=3000)))
    (folder / "talks").mkdir()
    for split, count in (("train", 200), ("val", 20)):  # for --data=talks
        rows = [[("user", draw.choice(words)), ("assistant", "".join(draw.choices(words, k=3)))] for _ in range(count)]
        talks = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
        (folder / "talks" / f"{split}.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    if "--from=base" in further:  # this base's tokenizer lacks the tokens of a conversation
        byte_level(BPE(vocab=BYTE_OF, merges=[])).save(str(folder / "bytes.json"))
        sizes = [flag for flag in further if flag.startswith(("--model-type", "--n-positions"))]
        train(folder, "base", ["--tokenizer=bytes.json", *sizes])
    if "MLX_DISABLE_COMPILE" not in os.environ:
        train(folder, "warm", further)  # fills the cache of compiled kernels
    _, duration = train(folder, "straight", further)
    expected = outcome(folder / "straight")
    differing = []
    for i in range(runs):
        name, killed = f"run{i}", 0
        while killed < kills:
            ended, _ = train(folder, name, further, seconds=draw.uniform(0.2, duration))
            if ended:
                break
            killed += 1
        train(folder, name, further)
        found = outcome(folder / name)
        differs = [what for what in expected | found if expected.get(what) != found.get(what)]
        print(f"{name}: killed {killed} times, {f'DIFFERENT in {differs}' if differs else 'the same'}", flush=True)
        if differs:
            differing.append(name)
    return differing


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        differing = compare(Path(folder), arguments.runs, arguments.kills, arguments.seed, further)
    print(f"{arguments.runs - len(differing)} of {arguments.runs} runs ended as the straight one.")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
