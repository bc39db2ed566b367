"""The same GPT-2 made of MLX's own parts and compiled, as a person writes it without mlx-gpt.

It has `nn.TransformerEncoder`, `nn.losses.cross_entropy` on all logits, `mlx.optimizers.AdamW` and one `mx.compile`.
Its attention gets the biases that GPT-2 has, so that weights and losses are the same.
"""

from typing import Any

import numpy as np

from contender import MLXContender
from harness import serve


class MLXLayers(MLXContender):
    """MLX's own layers, from the initial weights in `weights`. The other arguments are those of `Ours`."""

    def __init__(self, settings: dict[str, Any], weights: str, windows: str, device: str, precision: str) -> None:
        super().__init__(settings, device, precision)
        import mlx.core as mx
        import mlx.nn as nn
        from mlx import optimizers
        from mlx.utils import tree_map

        config, training, dtype = self.config, self.training, self.dtype

        class GPT(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wte = nn.Embedding(config.vocab_size, config.n_embd)
                self.wpe = nn.Embedding(config.n_positions, config.n_embd)
                self.encoder = nn.TransformerEncoder(
                    config.n_layer, config.n_embd, config.n_head, activation=nn.gelu_approx
                )
                for layer in self.encoder.layers:
                    layer.attention = nn.MultiHeadAttention(config.n_embd, config.n_head, bias=True)

            def __call__(self, ids_bt: mx.array) -> mx.array:
                T = ids_bt.shape[1]
                x_btc = self.wte(ids_bt) + self.wpe(mx.arange(T))
                mask = nn.MultiHeadAttention.create_additive_causal_mask(T, x_btc.dtype)
                return self.wte.as_linear(self.encoder(x_btc, mask))

        self._model = model = GPT()
        model.load_weights(list(layers_weights(mx.load(weights), config.n_layer).items()))

        def loss(parameters: dict, windows_bt: mx.array) -> mx.array:
            model.update(tree_map(lambda p: p.astype(dtype), parameters))
            logits_btv = model(windows_bt[:, :-1]).astype(mx.float32)
            return nn.losses.cross_entropy(logits_btv, windows_bt[:, 1:], reduction="mean")

        betas = [training.beta1, training.beta2]
        self._optimizer = optimizers.MultiOptimizer(
            [
                optimizers.AdamW(0.0, betas, weight_decay=decay, bias_correction=True)
                for decay in (training.weight_decay, 0.0)
            ],
            [lambda _, p: p.ndim >= 2],
        )
        self._optimizer.init(model.trainable_parameters())
        self._state = [model.state, self._optimizer.state]

        def step(windows_bt: mx.array) -> mx.array:
            parameters = model.trainable_parameters()
            value, gradients = mx.value_and_grad(loss)(parameters, windows_bt)
            gradients, _ = optimizers.clip_grad_norm(gradients, training.max_grad_norm)
            model.update(self._optimizer.apply_gradients(gradients, parameters))
            return value

        self._step = mx.compile(step, inputs=self._state, outputs=self._state)
        self.load_windows(windows)

    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        self._optimizer.learning_rate = rate
        loss = self._step(self.mx.array(windows_bt))
        self.mx.eval(loss, self._state)
        return loss


def layers_weights(weights: dict[str, Any], n_layer: int) -> dict[str, Any]:
    """GPT-2's weights by the names of MLX's layers."""
    renamed = {name: weights[name] for name in ("wte.weight", "wpe.weight")}
    renamed |= {f"encoder.ln.{kind}": weights[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    names = {"ln_1": "ln1", "ln_2": "ln2", "attn.c_proj": "attention.out_proj"}
    names |= {"mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    for i in range(n_layer):
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                renamed[f"encoder.layers.{i}.{theirs}.{kind}"] = weights[f"h.{i}.{ours}.{kind}"]
            thirds = weights[f"h.{i}.attn.c_attn.{kind}"].split(3)
            for part, third in zip(("query", "key", "value"), thirds, strict=True):
                renamed[f"encoder.layers.{i}.attention.{part}_proj.{kind}"] = third
    return renamed


if __name__ == "__main__":
    serve(MLXLayers)
