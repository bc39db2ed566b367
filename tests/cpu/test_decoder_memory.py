"""Memory that decoding on a CPU takes."""

import dataclasses

import mlx.core as mx

from mlx_gpt import models
from mlx_gpt.config import ModelConfig
from mlx_gpt.device import device


def test_changing_the_number_of_sequences_does_not_add_up():
    sizes = ModelConfig(vocab_size=64, n_layer=1, n_head=4, n_embd=512, n_positions=8, dropout=0.0)
    model = models.init_weights(models.create(sizes), 0)
    mx.eval(model.parameters())
    on = dataclasses.replace(device(), accelerated=True)
    held = []
    for _ in range(3):
        for sequences in (1, 8):
            on.decoder(model, sequences)
        held.append(mx.get_active_memory())
    assert held[-1] == held[0]
