"""The reference: the same GPT-2 in plain PyTorch, as a PyTorch user would write and train it.

It has fused attention (`scaled_dot_product_attention`), fused AdamW, autocast for bfloat16, and `torch.compile` on
request. Under autocast, weights, norms, residuals and the loss stay in float32. The parameters have the names that
mlx-gpt gives them, so its weights load unchanged.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

from contender import Contender
from harness import TORCH_DEVICES, serve


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_btc: torch.Tensor) -> torch.Tensor:
        B, T, C = x_btc.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.c_attn(x_btc).split(C, dim=2))
        y_bhtd = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_bhtd.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_btc: torch.Tensor) -> torch.Tensor:
        return self.c_proj(gelu(self.c_fc(x_btc), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x_btc: torch.Tensor) -> torch.Tensor:
        x_btc = x_btc + self.attn(self.ln_1(x_btc))
        return x_btc + self.mlp(self.ln_2(x_btc))


class GPT(nn.Module):
    """GPT-2 with its head tied to the token embedding."""

    def __init__(self, layers: int, heads: int, width: int, positions: int, entries: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(entries, width)
        self.wpe = nn.Embedding(positions, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, windows_bt: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of all tokens in (B, T + 1) windows except each window's first."""
        ids_bt, targets_bt = windows_bt[:, :-1], windows_bt[:, 1:]
        x_btc = self.wte(ids_bt) + self.wpe(torch.arange(ids_bt.shape[1], device=ids_bt.device))
        for block in self.h:
            x_btc = block(x_btc)
        logits_btv = linear(self.ln_f(x_btc), self.wte.weight)
        return cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten())


class Torch(Contender):
    """PyTorch on the device that MLX computes on.

    Args:
        settings: sizes and optimizer, by the names of mlx-gpt's settings.
        weights: a safetensors file of initial weights.
        windows: a file of `shapes.write_windows`.
        kind: "metal", "cuda" or "cpu".
        dtype: "float32" or "bfloat16".
        compiled: use `torch.compile`.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        weights: str,
        windows: str,
        kind: str,
        dtype: str,
        compiled: bool,
    ) -> None:
        self.kind, self._device = kind, torch.device(TORCH_DEVICES[kind])
        self._on_gpu = kind != "cpu"
        sizes = [settings[name] for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")]
        self._network = GPT(*sizes)
        self._network.load_state_dict(load_file(weights))
        self._network.to(self._device)
        self._model: Callable[[torch.Tensor], torch.Tensor] = (
            torch.compile(self._network) if compiled else self._network
        )
        matrices = [p for p in self._network.parameters() if p.ndim >= 2]
        others = [p for p in self._network.parameters() if p.ndim < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            betas=(settings["beta1"], settings["beta2"]),
            fused=True,
        )
        self._max_grad_norm = settings["max_grad_norm"]
        self._dtype = getattr(torch, dtype)
        self.load_windows(windows)

    def facts(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads()}

    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        windows = torch.from_numpy(windows_bt).to(self._device, torch.long)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._model(windows)
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.accelerator.synchronize()

    def reset_peak_memory(self) -> None:
        if self._on_gpu:
            torch.accelerator.reset_peak_memory_stats()

    def peak_memory(self) -> int | None:
        """Bytes held by tensors at once, cached memory excluded, as `mx.get_peak_memory` counts; None on a CPU."""
        return torch.accelerator.max_memory_allocated() if self._on_gpu else None

    def give_back(self) -> None:
        if self._on_gpu:
            torch.accelerator.empty_cache()


if __name__ == "__main__":
    serve(Torch)
