"""Generation from one model directory by one program: `generate_with.py ours|mlx-lm|transformers`.

Each program continues the same prompt B times, greedily, by a fixed number of tokens.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from contender import device_facts, open_device, resident_memory
from harness import TORCH_DEVICES, serve


class Generator(ABC):
    """Reads a model directory and generates from it."""

    def facts(self) -> dict[str, Any]:
        """Facts for the result."""
        return {}

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        """Generate B texts. Returns the first one's tokens, and the seconds until its first token and after it."""
        self.reset_peak_memory()
        started = time.perf_counter()
        tokens, times = [], []
        for token in self.generate(prompt, batch_size, new_tokens):
            tokens.append(token)
            times.append(time.perf_counter())
        return {
            "prefill": times[0] - started,
            "decode": times[-1] - times[0],
            "tokens": tokens,
            "peak_memory": self.peak_memory(),
            "resident_memory": resident_memory(),
        }

    @abstractmethod
    def generate(self, prompt: list[int], batch_size: int, new_tokens: int) -> Iterator[int]:
        """Yield each token of the first of B texts as soon as it is known."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start to count the peak again."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Most bytes that the library's arrays have held at once."""


class MLXGenerator(Generator):
    """What ours and mlx-lm have in common: the device, and a tuned BLAS on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = open_device(device)
        import mlx.core as mx

        self.mx = mx

    def reset_peak_memory(self) -> None:
        self.mx.clear_cache()
        self.mx.reset_peak_memory()

    def peak_memory(self) -> int:
        return self.mx.get_peak_memory()


class Ours(MLXGenerator):
    """mlx_gpt.generation.engine.

    Args:
        folder: a model directory.
        device: "cpu", "gpu" or "auto".
        write: settings of a run. If they are given, a model of that shape is written to the folder first.
    """

    def __init__(self, folder: str, device: str, write: dict[str, Any] | None = None) -> None:
        super().__init__(device)
        from mlx_gpt.api import load

        if write:
            write_model(Path(folder), write, self.device)
        self._model, self._tokenizer = load(folder)

    def facts(self) -> dict[str, Any]:
        from mlx.utils import tree_flatten

        from mlx_gpt import models
        from mlx_gpt.device import name_of
        from mlx_gpt.generation.cache import bytes_per_token

        weights = sum(weight.nbytes for _, weight in tree_flatten(self._model.parameters()))
        return device_facts(self.device) | {
            "dtype": name_of(self._model.wte.weight.dtype),
            "n_params": models.n_params(self._model),
            # Decoding a token reads every weight except the positions, and the keys and values of each token so far.
            "weight_bytes": weights - self._model.wpe.weight.nbytes,
            "cache_bytes": bytes_per_token(self._model),
        }

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        result = super().run(prompt, batch_size, new_tokens)
        if batch_size > 1:
            # The engine reads a prompt that its texts share only once. The others read it for each text, so time that.
            result["prefill"] = self._read(self.mx.array([prompt] * batch_size), len(prompt) + new_tokens)
        return result

    def _read(self, ids_bt: Any, capacity: int) -> float:
        """Seconds to read B prompts, up to the logits of their next tokens."""
        from mlx_gpt import models
        from mlx_gpt.generation.cache import make_cache

        started = time.perf_counter()
        B, T = ids_bt.shape
        network = self.device.decoder(self._model, B)
        cache = make_cache(network, B, capacity)
        cache.rows.begin(B)
        cache.rows.grow(T)
        x_btc = models.hidden(network, ids_bt, cache.layers)
        self.mx.eval(models.head(network, x_btc[:, -1]))
        return time.perf_counter() - started

    def generate(self, prompt: list[int], batch_size: int, new_tokens: int) -> Iterator[int]:
        from mlx_gpt.config import GenerationConfig
        from mlx_gpt.generation.engine import Engine
        from mlx_gpt.generation.requests import Request

        config = GenerationConfig(
            max_tokens=new_tokens, temperature=0.0, repetition_penalty=1.0, num_samples=batch_size, seed=0
        )
        engine = Engine(self._model, self._tokenizer, batch_size, len(prompt) + new_tokens)
        engine.add(Request(prompt, config, ends=False))
        while engine.busy:
            for _, piece in engine.step():
                if piece.sample == 0:
                    yield from (token.id for token in piece.tokens)


class MLXLM(MLXGenerator):
    """mlx-lm: `generate_step` for one text, `BatchGenerator` for several."""

    def __init__(self, folder: str, device: str) -> None:
        super().__init__(device)
        from mlx_lm.utils import load_model

        self._model, _ = load_model(Path(folder))

    def generate(self, prompt: list[int], batch_size: int, new_tokens: int) -> Iterator[int]:
        from mlx_lm.generate import BatchGenerator, generate_step

        if batch_size == 1:
            for token, _ in generate_step(self.mx.array(prompt), self._model, max_tokens=new_tokens):
                yield int(token)
            return
        generator = BatchGenerator(self._model, max_tokens=new_tokens)
        first, *_ = generator.insert([prompt] * batch_size)
        while responses := generator.next_generated():
            yield next(response.token for response in responses if response.uid == first)
        generator.close()


class Transformers:
    """transformers' own `generate`. PyTorch doesn't count a peak of memory on every device, so there is none."""

    def __init__(self, folder: str, kind: str) -> None:
        import torch
        import transformers

        self._torch, self._device = torch, TORCH_DEVICES[kind]
        # Its own types forbid what its documentation shows.
        self._model = cast(Any, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
        self._model.to(self._device).eval()

    def facts(self) -> dict[str, Any]:
        """Facts for the result."""
        return {}

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        """As `Generator.run`."""
        times: list[float] = []

        class Clock:
            """A streamer that notes when each token comes. The prompt comes first."""

            def put(self, tokens: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        ids_bt = self._torch.tensor([prompt] * batch_size, device=self._device)
        started = time.perf_counter()
        texts = self._model.generate(
            ids_bt,
            attention_mask=self._torch.ones_like(ids_bt),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            streamer=Clock(),
        )
        return {
            "prefill": times[1] - started,
            "decode": times[-1] - times[1],
            "tokens": texts[0, len(prompt) :].tolist(),
            "peak_memory": None,
            "resident_memory": resident_memory(),
        }


def write_model(folder: Path, settings: dict[str, Any], device: Any) -> None:
    """Write a model directory with random weights, in the dtype that mlx-gpt computes in on this device."""
    from mlx.utils import tree_map
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import BPE

    from mlx_gpt import models
    from mlx_gpt.models.directory import save_model
    from mlx_gpt.settings import resolve
    from mlx_gpt.token_bytes import BYTE_OF
    from mlx_gpt.tokenizer import Tokenizer

    config, dtype = resolve(settings).model, device.dtype("auto")
    model = models.init_weights(models.create(config), 0)
    model.update(tree_map(lambda weight: weight.astype(dtype), model.parameters()))
    # As many entries as the weights have, including the end of the text, or mlx-gpt would never choose the others.
    entries = BYTE_OF | {f"<{i}>": i for i in range(len(BYTE_OF), config.vocab_size - 1)}
    save_model(folder, model, Tokenizer(HFTokenizer(BPE(vocab=entries, merges=[]))))


if __name__ == "__main__":
    serve({"ours": Ours, "mlx-lm": MLXLM, "transformers": Transformers}[sys.argv[1]])
