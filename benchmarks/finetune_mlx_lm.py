"""Fine-tuning by mlx-lm's own trainer, as `mlx_lm.lora --train --mask-prompt` calls it, timed after its first steps."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contender import open_device, resident_memory
from harness import serve

SEED = 0


class FineTuning:
    """Trains adapters.

    Args:
        base: a model directory.
        data: a folder with train.jsonl.
        rank, scale: of the adapters, which all blocks get.
        rate: the learning rate of Adam, which stays the same.
        batch_size: conversations in a step.
    """

    def __init__(
        self, base: str, data: str, rank: int, scale: float, rate: float, batch_size: int, device: str
    ) -> None:
        open_device(device)
        import mlx.core as mx
        import mlx.optimizers as optim
        import numpy as np
        from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load

        np.random.seed(SEED)
        mx.random.seed(SEED)
        loaded: Any = load(base, return_config=True)
        self._model, self._tokenizer, self._config = loaded
        talks, _, _ = load_local_dataset(Path(data), self._tokenizer, SimpleNamespace(mask_prompt=True))
        self._base, self._talks, self._batch_size = base, CacheDataset(talks), batch_size
        self._model.freeze()
        adapters = {"rank": rank, "scale": scale, "dropout": 0.0}
        linear_to_lora_layers(self._model, len(self._model.layers), adapters)
        self._optimizer = optim.Adam(learning_rate=rate)

    def facts(self) -> dict[str, Any]:
        return {}

    def train(self, out: str, steps: int, warm_up: int) -> dict[str, Any]:
        """Make `steps` steps, and fuse the result into `out`. The clock does not count the first `warm_up` steps."""
        import mlx.core as mx
        from mlx.utils import tree_unflatten
        from mlx_lm.tuner.callbacks import TrainingCallback
        from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
        from mlx_lm.utils import save

        found: dict[str, Any] = {}
        lengths: list[int] = []
        began = 0.0

        class Clock(TrainingCallback):
            def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
                nonlocal began
                if train_info["iteration"] == warm_up:
                    mx.reset_peak_memory()
                    began = time.perf_counter()
                if train_info["iteration"] == steps:
                    found["seconds"] = time.perf_counter() - began
                    found.update(peak_memory=mx.get_peak_memory(), resident_memory=resident_memory())

        def counted(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
            for batch, spans in iterate_batches(*args, **kwargs):
                lengths.append(int(spans[:, 1].sum()))
                yield batch, spans

        out_path = Path(out)
        out_path.mkdir()
        args = TrainingArgs(
            batch_size=self._batch_size,
            iters=steps,
            steps_per_report=warm_up,
            steps_per_save=10**9,
            adapter_file=str(out_path / "adapters.safetensors"),
        )
        train(self._model, self._optimizer, self._talks, args=args, iterate_batches=counted, training_callback=Clock())
        fused = [(name, module.fuse()) for name, module in self._model.named_modules() if hasattr(module, "fuse")]
        self._model.update_modules(tree_unflatten(fused))
        save(out_path / "fused", self._base, self._model, self._tokenizer, self._config)
        return found | {"tokens": sum(lengths[warm_up:steps]), "folder": str((out_path / "fused").resolve())}


if __name__ == "__main__":
    serve(FineTuning)
