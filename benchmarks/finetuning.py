"""Measures how fast mlx-gpt fine-tunes on conversations and how good the result is, compared with mlx-lm.

    python benchmarks/finetuning.py

A small Qwen3 is trained on the built-in text first. Then it learns from conversations, from the same weights each time:
with adapters here, with all weights here, and with adapters by mlx-lm's own trainer. Both kinds of adapters have the
same rank, scale, blocks and, in every step, learning rate; all weights have the rate that is their default. A step has
about the same tokens: those of as many conversations as mlx-lm's batch. Only the answers have a loss. Tokens per second
count the conversations and no padding. One program evaluates all three results, on questions that ask for the same in
other words.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import (
    NotInstalledError,
    Worker,
    common_options,
    device_option,
    leave_out,
    need,
    pairwise,
    summary,
    turns_bar,
)
from talks import write_conversations

OURS, ALL, MLX_LM = "mlx-gpt, adapters", "mlx-gpt, all weights", "mlx-lm, adapters"
NEVER = 10**9
WARM_UP = 10
SCALE = 20.0


@click.command()
@click.option("--base-steps", default=200, show_default=True, type=click.IntRange(1), help="Steps on text, before.")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(WARM_UP + 1), help="Of each fine-tuning.")
@click.option("--towns", default=200, show_default=True, type=click.IntRange(1), help="Four conversations about each.")
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1), help="Of the adapters.")
@click.option("--learning-rate", default=5e-4, show_default=True, type=click.FloatRange(0), help="Of the adapters.")
@click.option(
    "--batch-size", default=4, show_default=True, type=click.IntRange(1), help="mlx-lm's conversations a step."
)
@click.option("--seq-len", default=128, show_default=True, type=click.IntRange(1), help="Of a window here.")
@device_option
@common_options
def main(
    base_steps: int,
    steps: int,
    towns: int,
    rank: int,
    learning_rate: float,
    batch_size: int,
    seq_len: int,
    device: str,
    threads: int,
    trials: int,
    json_file: str | None,
) -> None:
    """Fine-tune one model on conversations in three ways that take turns."""
    result = facts.begin("finetuning", steps=steps, rank=rank, threads=threads, trials=trials)
    names = [OURS, ALL, MLX_LM]
    try:
        need("mlx-lm")
    except NotInstalledError as error:
        leave_out(MLX_LM, error)
        names.remove(MLX_LM)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.chdir(folder))
        conversations = write_conversations(folder, towns)
        ruler = stack.enter_context(Worker("evaluation", ["finetune_ours.py"], threads, {"device": device}))
        text = {"data": "builtin", "preset": "tiny", "model_type": "qwen3", "max_steps": base_steps, "out": "base"}
        data = {"base": ruler.ask("make_base", settings=text)["folder"], "data": str(folder)}
        packed = ruler.ask("pack", **data, seq_len=seq_len)
        # Here each conversation is followed by an end of text, which does not count.
        tokens = packed["tokens"] - conversations
        windows = max(1, round(batch_size * packed["windows"] / conversations))
        here: dict[str, Any] = {
            "init_from": data["base"],
            "data": data["data"],
            "seq_len": seq_len,
            "batch_size": windows,
        }
        here |= {"gradient_accumulation_steps": 1, "eval_every": NEVER, "save_every": NEVER, "max_epochs": float(NEVER)}
        adapters: dict[str, Any] = {"lora_rank": rank, "lora_scale": SCALE, "learning_rate": learning_rate}
        adapters |= {"schedule": "constant", "warmup_steps": 0}  # as in mlx-lm
        there = {**data, "rank": rank, "scale": SCALE, "rate": learning_rate, "batch_size": batch_size}
        tokens_here = (steps - WARM_UP) * windows * tokens / packed["windows"]

        def train(name: str, turn: int) -> dict[str, Any]:
            out, made = f"{names.index(name)}-{turn}", {"steps": steps, "warm_up": WARM_UP}
            if name == MLX_LM:
                with Worker(name, ["finetune_mlx_lm.py"], threads, {**there, "device": device}) as worker:
                    done: dict[str, Any] = worker.ask("train", out=out, **made)
            else:
                settings = here | (adapters if name == OURS else {}) | {"out": out, "seed": turn}
                with Worker(name, ["finetune_ours.py"], threads, {"device": device}) as worker:
                    done = worker.ask("train", settings=settings, **made) | {"tokens": tokens_here}
            return done | {"loss": ruler.ask("loss", folder=done["folder"], **data, seq_len=seq_len)}

        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        with turns_bar("finetuning", trials * len(names)) as advance:
            for turn in range(1, trials + 1):
                for name in names:
                    found[name].append(train(name, turn))
                    advance()
        before = ruler.ask("loss", folder=data["base"], **data, seq_len=seq_len)
    sizes = f"4 layers, 128 wide, {conversations} conversations of {tokens / conversations:.0f} tokens on average"
    sizes += f"; a step has {batch_size} of them (mlx-lm) or {windows} windows of {seq_len} tokens (mlx-gpt)"
    result["shapes"] = {"qwen3": {"sizes": sizes, **ruler.facts, "loss_before": before}}
    result["rows"] = rows(found)
    report.finish(result, json_file)


def rows(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each way."""
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    return [
        {
            "program": name,
            "tokens_per_second": summary(speeds[name]),
            "seconds": summary([run["seconds"] for run in runs]),
            "peak_memory": statistics.median(run["peak_memory"] for run in runs),
            "resident_memory": statistics.median(run["resident_memory"] for run in runs),
            "loss": summary([run["loss"] for run in runs]),
            "ours_over_this": pairwise(speeds[OURS], speeds[name]) if name != OURS else None,
        }
        for name, runs in found.items()
    ]


if __name__ == "__main__":
    main()
