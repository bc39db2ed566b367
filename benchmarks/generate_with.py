"""Generation from one model directory with ours, mlx-lm or transformers: `generate_with.py ours|mlx-lm|transformers`.

Each continues the same prompt B times, greedily, by a fixed number of tokens.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from contender import resident_memory
from harness import serve


class Generator(ABC):
    """Reads a model directory."""

    def facts(self) -> dict[str, Any]:
        """What there is to know of it."""
        return {}

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        """Generate: seconds up to the first token, seconds for those after it, the tokens of the first text."""
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
        """The tokens of the first of B texts, one by one as they are known."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Forget the peak."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Bytes that the library has held at once for arrays."""


class MLXGenerator(Generator):
    """What ours and mlx-lm have in common: the device, and a tuned BLAS on a CPU."""

    def __init__(self, device: str) -> None:
        from mlx_gpt import _blas, backend  # first, so that the BLAS is in place

        import mlx.core as mx  # isort: skip

        self.mx = mx
        if device != "auto":
            mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
        self.device = backend.device()
        backend.prepare(self.device)
        self.blas = Path(_blas.live).name if self.device.kind == "cpu" else ""

    def reset_peak_memory(self) -> None:
        self.mx.clear_cache()
        self.mx.reset_peak_memory()

    def peak_memory(self) -> int:
        return self.mx.get_peak_memory()


class Ours(MLXGenerator):
    """mlx_gpt.generation.engine."""

    def __init__(self, folder: str, device: str, write: dict[str, Any]) -> None:
        super().__init__(device)
        import mlx_gpt

        write_model(Path(folder), write, self.device)
        self._model, self._tokenizer = mlx_gpt.load(folder)

    def facts(self) -> dict[str, Any]:
        from mlx.utils import tree_flatten

        config, dtype = self._model.config, self._model.wte.weight.dtype
        weights = sum(weight.nbytes for _, weight in tree_flatten(self._model.parameters()))
        return {
            "kind": self.device.kind,
            "device": self.device.name,
            "blas": self.blas,
            "dtype": str(dtype).removeprefix("mlx.core."),
            "n_params": self._model.n_params(),
            # Read for each token: every weight but the positions, of which one row is; keys and values per position.
            "weight_bytes": weights - self._model.wpe.weight.nbytes,
            "cache_bytes": 2 * config.n_layer * config.n_embd * dtype.size,
        }

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        from mlx_gpt.generation import engine

        result = super().run(prompt, batch_size, new_tokens)
        if batch_size > 1:
            # The engine reads a prompt that its texts share only once. The others read all, so time that.
            ids_bt = self.mx.array([prompt] * batch_size)
            started = time.perf_counter()
            network = engine.in_parts(self._model, batch_size)
            cache = engine.make_cache(network, batch_size, len(prompt) + new_tokens)
            cache.rows.begin(batch_size)
            self.mx.eval(engine.read(network, ids_bt, cache))
            result["prefill"] = time.perf_counter() - started
        return result

    def generate(self, prompt: list[int], batch_size: int, new_tokens: int) -> Iterator[int]:
        from mlx_gpt.config import GenerationConfig
        from mlx_gpt.generation.engine import Engine, Request

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
    """transformers' own `generate`, in PyTorch, which counts no peak of memory everywhere."""

    def __init__(self, folder: str, kind: str) -> None:
        import torch
        import transformers

        self._torch, self._device = torch, {"cpu": "cpu", "metal": "mps", "cuda": "cuda"}[kind]
        # Its own types forbid what its documentation shows.
        self._model = cast(Any, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))
        self._model.to(self._device).eval()

    def facts(self) -> dict[str, Any]:
        """What there is to know of it."""
        return {}

    def run(self, prompt: list[int], batch_size: int, new_tokens: int) -> dict[str, Any]:
        """As `Generator.run`."""
        times: list[float] = []

        class Clock:
            """A streamer that notes when each token comes; the prompt comes first."""

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
    """Write a fresh model directory in the dtype that mlx-gpt computes in on this device, which all then read."""
    from mlx_gpt.backend import compute_dtype
    from mlx_gpt.model import GPT
    from mlx_gpt.models.directory import save_model
    from mlx_gpt.settings import resolve
    from mlx_gpt.tokenizer import BYTE_OF, Tokenizer

    from mlx.utils import tree_map  # isort: skip
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    dtype = compute_dtype("auto", device)
    config = resolve(settings).model
    model = GPT(config).init_weights(0)
    model.update(tree_map(lambda weight: weight.astype(dtype), model.parameters()))
    # As many entries as the weights have, the end of the text among them: none may be barred from what is generated.
    entries = BYTE_OF | {f"<{i}>": i for i in range(len(BYTE_OF), config.vocab_size - 1)}
    save_model(folder, model, Tokenizer(HFTokenizer(models.BPE(vocab=entries, merges=[]))))


if __name__ == "__main__":
    serve({"ours": Ours, "mlx-lm": MLXLM, "transformers": Transformers}[sys.argv[1]])
