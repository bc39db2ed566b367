"""The contenders that train one shape: started with equal weights, checked for equal losses, timed in turns."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import facts
from harness import NotInstalledError, Worker, leave_out, need, pairwise, summary, take_turns, turns_bar
from shapes import Found, describe, of_a_step, write_windows

OURS, MLX_NN = "mlx-gpt", "mlx.nn"
EAGER, COMPILED = "torch-eager", "torch-compile"
TORCH = {EAGER: "PyTorch eager", COMPILED: "PyTorch compiled"}
REFERENCE = {"cpu": EAGER, "metal": COMPILED, "cuda": COMPILED}
CHECKED_STEPS = 10
# Largest relative difference of the first loss, which depends on the network, and of the others, which depend on the
# optimizer too. Libraries sum in different orders, and Adam's update for a gradient near zero is mostly rounding.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 2e-2)}
TRIAL_SECONDS = 3.0


@dataclass(frozen=True)
class Options:
    """How to measure. If `steps` is None, a trial has as many steps as take three seconds."""

    device: str
    precision: str
    steps: int | None
    trials: int
    threads: int
    smoke: bool


class Contest:
    """Contenders on one shape. Ours comes first, and the others start from its weights. `stack` ends them all."""

    def __init__(self, settings: dict[str, Any], options: Options, folder: Path, stack: contextlib.ExitStack) -> None:
        self.settings, self.options = settings, options
        self.losses: dict[str, list[float]] = {}
        self._stack, self._step_seconds = stack, 1e-3
        self._windows, self._weights = str(folder / "windows.npy"), str(folder / "weights.safetensors")
        write_windows(Path(self._windows), settings)
        self.ours = stack.enter_context(self._with_mlx(OURS, "train_ours.py"))
        self.workers = [self.ours]
        self.ours.ask("save_weights", path=self._weights)
        self._rates = self.ours.ask("rates", steps=CHECKED_STEPS)

    def memory(self) -> tuple[int, int]:
        """Bytes that ours takes for a step, measured in its first steps, and bytes that a run may take.

        If two programs don't have room for weights, gradients and AdamW's means, no step is made, and the first number
        counts only those.
        """
        memory = self.ours.ask("memory")
        if 2 * memory["least"] > memory["usable"]:
            return memory["least"], memory["usable"]
        steps = self._first_steps(self.ours)
        self._keep_first_steps(self.ours, steps)
        return steps["peak_memory"], memory["usable"]

    def admit(self, against: Sequence[str]) -> None:
        """Start the contenders `against` ours, by default PyTorch, and let them make the first steps, after `memory`.

        A contender that fails is left out with a sentence. If that is compiled PyTorch, because it failed or because
        its losses differ from ours, PyTorch eager takes its place.
        """
        names = list(against) or [REFERENCE[self.ours.facts["kind"]]]
        for name in names:
            try:
                self._admit(name)
            except click.ClickException as error:
                leave_out(name, error)
                if name == COMPILED and EAGER not in names and not isinstance(error, NotInstalledError):
                    click.echo("PyTorch eager takes its place.", err=True)
                    names.append(EAGER)  # which this loop reaches last

    def check(self) -> float:
        """The largest relative difference of a loss from ours.

        Raises:
            click.ClickException: it is more than rounding explains.
        """
        return largest_difference(self.losses, TOLERANCE[self.ours.facts["dtype"]])

    def time(self, bar: str) -> Found:
        """Time the contenders and the device itself in turns."""
        steps = self.options.steps or max(2, math.ceil(TRIAL_SECONDS / self._step_seconds))
        rates = self._rates[-1:] * (1 + steps)
        limits = self._limits()

        def ask(worker: Worker) -> Any:
            if worker in limits:
                return {what: worker.ask(what) for what in worker.facts["limits"]}
            return worker.ask("run", rates=rates, warm_up=1)

        with turns_bar(bar, self.options.trials * (len(self.workers) + len(limits))) as turn:
            answers = take_turns([*self.workers, *limits], self.options.trials, ask, turn)
        products = {limit.name: max(answer["product"] for answer in answers[limit.name]) for limit in limits}
        tokens = steps * self.settings["batch_size"] * self.settings["seq_len"]
        speeds = {worker.name: [tokens / trial["seconds"] for trial in answers[worker.name]] for worker in self.workers}
        peak = max(products.values())
        shape = {
            "sizes": describe(self.settings),
            **self.ours.facts,
            "steps": steps,
            "loss_difference": self.check(),
            "product_tflops": products,
            "copy_gb_per_second": max(answer["copy"] for answer in answers[limits[0].name]),
        }
        return shape, [self._row(worker, speeds, answers[worker.name], peak) for worker in self.workers]

    def _row(
        self, worker: Worker, speeds: dict[str, list[float]], trials: list[dict[str, Any]], peak: float
    ) -> dict[str, Any]:
        speed = summary(speeds[worker.name])
        tflops = speed["median"] * self.ours.facts["flops_per_token"] / 1e12
        return {
            "program": worker.name,
            "seconds": [trial["seconds"] for trial in trials],
            "tokens_per_second": speed,
            "tflops": tflops,
            "mfu": tflops / peak,
            "peak_memory": trials[-1]["peak_memory"],
            "resident_memory": worker.ask("resident_memory"),
            "ours_over_this": None if worker is self.ours else pairwise(speeds[OURS], speeds[worker.name]),
        }

    def _admit(self, name: str) -> None:
        """Start one contender and let it make the first steps.

        Raises:
            click.ClickException: it failed, or it is compiled PyTorch and its losses differ from ours.
        """
        with contextlib.ExitStack() as started:
            worker = started.enter_context(self._start(name))
            steps = self._first_steps(worker)
            if name == COMPILED:
                losses = {OURS: self.losses[OURS], worker.name: steps["losses"]}
                largest_difference(losses, TOLERANCE[self.ours.facts["dtype"]])
            self._stack.enter_context(started.pop_all())
        self.workers.append(worker)
        self._keep_first_steps(worker, steps)

    def _first_steps(self, worker: Worker) -> Any:
        return worker.ask("run", rates=self._rates, warm_up=CHECKED_STEPS // 2)

    def _keep_first_steps(self, worker: Worker, steps: dict[str, Any]) -> None:
        self.losses[worker.name] = steps["losses"]
        self._step_seconds = max(self._step_seconds, steps["seconds"] / (CHECKED_STEPS - CHECKED_STEPS // 2))

    def _limits(self) -> list[Worker]:
        """The workers that time the device: MLX's, and PyTorch's if PyTorch is a contender."""
        libraries = {"MLX": "mlx"}
        if not self.options.smoke and any(worker.name.startswith("PyTorch") for worker in self.workers):
            libraries["PyTorch"] = "torch"
        settings = self._here() | {"smoke": self.options.smoke}
        workers = [Worker(name, ["roofline.py", by], self.options.threads, settings) for name, by in libraries.items()]
        return [self._stack.enter_context(worker) for worker in workers]

    def _start(self, name: str) -> Worker:
        if name in TORCH:
            need("torch")
            given = {"settings": self.settings, "windows": self._windows, "weights": self._weights, **self._here()}
            shown = TORCH[name] if self.ours.facts["dtype"] == "float32" else f"{TORCH[name]}, autocast"
            return Worker(shown, ["train_torch.py"], self.options.threads, given | {"compiled": name == COMPILED})
        if name == "mlx-nn":
            return self._with_mlx(MLX_NN, "train_mlx_nn.py", weights=self._weights)
        checkout = Path(name).resolve()
        other = facts.name_of_checkout(checkout)
        if not other:
            raise click.ClickException(f"{name} is neither {', '.join(TORCH)}, mlx-nn nor a checkout of mlx-gpt.")
        return self._with_mlx(other, "train_ours.py", checkout, weights=self._weights)

    def _with_mlx(self, name: str, program: str, checkout: Path | None = None, **more: str) -> Worker:
        settings = of_a_step(self.settings) if checkout else self.settings
        given = {"settings": settings, "windows": self._windows}
        where = {"device": self.options.device, "precision": self.options.precision}
        return Worker(name, [program], self.options.threads, {**given, **where, **more}, checkout)

    def _here(self) -> dict[str, str]:
        return {name: self.ours.facts[name] for name in ("kind", "dtype")}


def largest_difference(losses: dict[str, list[float]], tolerance: tuple[float, float]) -> float:
    """The largest relative difference of a loss from ours.

    Raises:
        click.ClickException: it exceeds the `tolerance` of the first step or of the later steps, so that a comparison
            would mean nothing.
    """
    largest = 0.0
    for name, others in losses.items():
        for step, (ours, other) in enumerate(zip(losses[OURS], others, strict=True), 1):
            difference = abs(other - ours) / abs(ours)
            if not difference <= tolerance[step > 1]:  # so a NaN is refused too
                raise click.ClickException(
                    f"In step {step} the loss of {name} is {other:.5f} and ours {ours:.5f}: they don't train the same "
                    "network, so they are not compared."
                )
            largest = max(largest, difference)
    return largest
