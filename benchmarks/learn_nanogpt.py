"""nanoGPT's way to train a small model, in plain PyTorch, with a time limit.

The network is the GPT-2 of train_torch.py, which has biases, as GPT-2 has; nanoGPT leaves them out by default. The
settings are those of nanoGPT's example for a CPU: 4 layers, 4 heads, 128 wide, windows of 64 tokens drawn at random, 12
in a batch, AdamW (betas 0.9 and 0.99, decay 0.1 on matrices), gradients clipped to 1, no dropout, and a rate that rises
to 1e-3 in 100 steps and falls by a cosine to a tenth. nanoGPT lays the schedule over a number of steps; this lays it
over the time, so that the rate has come down when time is up. On CUDA the network is compiled and computes in bfloat16
(autocast), as in nanoGPT.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import TORCH_DEVICES, serve
from train_torch import GPT

LAYERS, HEADS, WIDTH, WINDOW, BATCH = 4, 4, 128, 64, 12
HIGHEST, LOWEST, WARM_UP, DECAY, BETAS = 1e-3, 1e-4, 100, 0.1, (0.9, 0.99)


class NanoGPT:
    """One training.

    Args:
        tokens: a folder with train.npy, val.npy and bytes.npy: ids, ids, and the UTF-8 bytes of each id.
        minutes: the time limit, evaluations included.
        steps: stop after these instead.
        kind: "metal", "cuda" or "cpu".
    """

    def __init__(
        self, tokens: str, seed: int, minutes: float, steps: int | None, evaluate_every: int, kind: str
    ) -> None:
        torch.manual_seed(seed)
        folder = Path(tokens)
        self._train, self._val = (
            torch.from_numpy(np.load(folder / f"{s}.npy").astype(np.int64)) for s in ("train", "val")
        )
        self._bytes = np.load(folder / "bytes.npy")
        self._minutes, self._steps, self._evaluate_every = minutes, steps, evaluate_every
        self._kind, self._device = kind, torch.device(TORCH_DEVICES[kind])
        self._network = GPT(LAYERS, HEADS, WIDTH, WINDOW, len(self._bytes)).to(self._device)
        for name, weight in self._network.named_parameters():
            if weight.ndim >= 2:
                scale = 0.02 / math.sqrt(2 * LAYERS) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(weight, std=scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        self._loss = torch.compile(self._network) if kind == "cuda" else self._network
        matrices = [p for p in self._network.parameters() if p.ndim >= 2]
        others = [p for p in self._network.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=HIGHEST, betas=BETAS, fused=True)
        self._draw = torch.Generator().manual_seed(seed)

    def facts(self) -> dict[str, Any]:
        dtype = "bfloat16 autocast" if self._kind == "cuda" else "float32"
        return {"threads": torch.get_num_threads(), "kind": self._kind, "dtype": dtype, "dropout": 0.0}

    def train(self) -> dict[str, Any]:
        """Train, and return the validation curve in bits per byte over minutes and steps, and the lowest of them."""
        curve, step, began = [], 0, time.perf_counter()
        while True:
            minutes = (time.perf_counter() - began) / 60
            done = step / self._steps if self._steps else minutes / self._minutes
            if step % self._evaluate_every == 0 or done >= 1:
                bits = self.bits_per_byte()
                minutes = (time.perf_counter() - began) / 60
                curve.append({"step": step, "minutes": minutes, "bits_per_byte": bits})
            if done >= 1:
                break
            falling = LOWEST + 0.5 * (1 + math.cos(math.pi * done)) * (HIGHEST - LOWEST)
            self._step(min(falling, HIGHEST * (step + 1) / (WARM_UP + 1)))
            step += 1
        return {
            "curve": curve,
            "bits_per_byte": min(point["bits_per_byte"] for point in curve),
            "steps": step,
            "parameters": sum(p.numel() for p in self._network.parameters()),
        }

    def _step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(self._train) - WINDOW, (BATCH,), generator=self._draw)
        windows = torch.stack([self._train[start : start + WINDOW + 1] for start in starts])
        with self._autocast():
            loss = self._loss(windows.to(self._device))
        loss.backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self._kind == "cuda" else contextlib.nullcontext()

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """Evaluate on the validation side, window after window, without the incomplete one at its end."""
        whole = (len(self._val) - 1) // WINDOW * WINDOW
        windows = torch.stack([self._val[:whole].view(-1, WINDOW), self._val[1 : whole + 1].view(-1, WINDOW)])
        nats = 0.0
        for inputs, targets in zip(windows[0].split(64), windows[1].split(64), strict=True):
            batch = torch.cat([inputs, targets[:, -1:]], dim=1).to(self._device)
            with self._autocast():
                nats += self._network(batch).item() * targets.numel()
        return nats / math.log(2) / int(self._bytes[self._val[1 : whole + 1].numpy()].sum())


if __name__ == "__main__":
    serve(NanoGPT)
