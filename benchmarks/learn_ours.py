"""`mlx-gpt train` with a time limit, in a process of its own."""

from pathlib import Path
from typing import Any

from contender import choose_device, device_facts
from harness import serve


class Learning:
    """One run of mlx-gpt.

    Args:
        settings: of the run, by name.
        minutes: the time limit of the training, evaluations included; None if `settings` limit the steps.
        evaluate_every: steps between two evaluations.
    """

    def __init__(self, settings: dict[str, Any], minutes: float | None, evaluate_every: int, device: str) -> None:
        choose_device(device)
        limit = {} if minutes is None else {"max_minutes": minutes}
        # The whole validation side, and as many epochs as the time allows.
        often = {
            "eval_every": evaluate_every,
            "eval_windows": 0,
            "save_every": 10**9,
            "max_epochs": None if limit else 1e6,
        }
        self._settings = {**settings, **limit, **often}

    def facts(self) -> dict[str, Any]:
        from mlx_gpt.device import device, name_of

        here = device()
        return device_facts(here) | {"dtype": name_of(here.dtype("auto"))}

    def train(self) -> dict[str, Any]:
        """Train, and return the validation curve in bits per byte over minutes and steps, and the best model's."""
        from mlx_gpt import models, train
        from mlx_gpt.models.directory import load_model
        from mlx_gpt.settings import read_toml
        from mlx_gpt.training.metrics import read_records

        folder = Path(train(**self._settings))
        curve = [
            {"step": record["step"], "minutes": record["seconds"] / 60, "bits_per_byte": record["val_bits_per_byte"]}
            for record in read_records(folder)
            if record.get("val_bits_per_byte") is not None  # it is None if the loss was not finite
        ]
        return {
            "curve": curve,
            "bits_per_byte": min(point["bits_per_byte"] for point in curve),
            "steps": curve[-1]["step"],
            "parameters": models.n_params(load_model(folder / "final")),
            "dropout": read_toml(folder / "run.toml")["dropout"],
        }


if __name__ == "__main__":
    serve(Learning)
