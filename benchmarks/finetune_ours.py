"""Fine-tuning by `mlx-gpt train --from`, timed after its first steps, and helpers for the comparison with mlx-lm."""

import json
import time
from pathlib import Path
from typing import Any

from contender import open_device, resident_memory
from harness import serve


class FineTuning:
    """Trains, and evaluates model directories. Files go to the current folder."""

    def __init__(self, device: str) -> None:
        self._device = open_device(device)

    def facts(self) -> dict[str, Any]:
        return {"kind": self._device.kind}

    def make_base(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Train a model on text, give it ChatML, and return its directory."""
        from mlx_gpt import train
        from mlx_gpt.chat_template import CHATML

        folder = Path(train(**settings)) / "final"
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHATML}))
        return {"folder": str(folder.resolve())}

    def pack(self, base: str, data: str, seq_len: int) -> dict[str, int]:
        """Return the number of tokens in the training conversations, and the number of windows that they fill."""
        tokens, windows, _ = self._encode(base, data, seq_len)
        return {"tokens": len(tokens.train), "windows": windows.per_epoch}

    def train(self, settings: dict[str, Any], steps: int, warm_up: int) -> dict[str, Any]:
        """Make `steps` steps. The clock runs from after the first `warm_up` until the last is computed."""
        import mlx.core as mx

        from mlx_gpt.progress import Lines
        from mlx_gpt.training.loop import train

        found: dict[str, Any] = {}
        made, began = 0, 0.0

        def made_a_step() -> bool:
            nonlocal made, began
            made += 1
            if made == warm_up:
                mx.synchronize()
                mx.reset_peak_memory()
                began = time.perf_counter()
            if made == steps:
                mx.synchronize()
                found["seconds"] = time.perf_counter() - began
                found.update(peak_memory=mx.get_peak_memory(), resident_memory=resident_memory())
            return False

        outcome = train({**settings, "max_steps": steps}, Lines(), stop_requested=made_a_step)
        return found | {"folder": str((outcome.folder / "final").resolve())}

    def loss(self, folder: str, base: str, data: str, seq_len: int) -> float:
        """Return the validation loss of a model directory, in nats per token of the answers."""
        from mlx_gpt.evaluation import Evaluator
        from mlx_gpt.models.directory import load_model
        from mlx_gpt.models.tokenizer_files import read_tokenizer

        _, _, windows = self._encode(base, data, seq_len)
        model, lengths = load_model(folder), read_tokenizer(Path(base)).byte_lengths()
        return Evaluator(self._device.accelerate(model), windows, lengths, batch_size=8, on=self._device)().loss

    def _encode(self, base: str, data: str, seq_len: int) -> tuple[Any, Any, Any]:
        from mlx_gpt.config import TrainingConfig
        from mlx_gpt.data.corpus import open_corpus
        from mlx_gpt.models.tokenizer_files import read_tokenizer
        from mlx_gpt.objectives.chat import Chat

        tokens = Chat.encode(open_corpus(data), read_tokenizer(Path(base)), TrainingConfig())
        return tokens, Chat.windows(tokens, "train", seq_len), Chat.windows(tokens, "val", seq_len)


if __name__ == "__main__":
    serve(FineTuning)
