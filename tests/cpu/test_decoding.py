"""A network whose blocks are computed in parts, side by side, gives the same results as the undivided network."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt import models
from mlx_gpt.config import GenerationConfig, ModelConfig
from mlx_gpt.cpu import decoding, streams
from mlx_gpt.generation.cache import make_cache
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request
from mlx_gpt.models.directory import load_model, save_model

QWEN3: dict[str, Any] = {"model_type": "qwen3", "n_head": 4, "n_kv_head": 2}


@pytest.fixture(autouse=True)
def worth_it(monkeypatch):
    """Networks as small as those of the tests are divided, and there are two cores to divide them among."""
    monkeypatch.setattr(decoding, "WORTH_IT", 1)
    monkeypatch.setattr(streams, "cores", lambda: 2)


@pytest.fixture(params=[{}, QWEN3], ids=["gpt2", "qwen3"])
def make_model(request, make_model):
    """Make either network of ours."""
    return lambda **settings: make_model(**request.param | settings)


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)


def read(network, ids, cache):
    """The logits of the tokens after `ids`."""
    cache.rows.grow(ids.shape[1])
    return network(mx.array(ids), cache.layers)


def empty_cache(network, sequences, capacity):
    cache = make_cache(network, sequences, capacity)
    cache.rows.begin(sequences)
    return cache


@pytest.mark.parametrize(("sequences", "parts"), [(1, 1), (4, 2)])
def test_parts_read_as_the_network_does(make_model, ids, sequences, parts):
    """Chunks of a prompt and single tokens; one sequence leaves the blocks whole."""
    model, ids = make_model().eval(), ids[:sequences]
    network = decoding.decoder(model, sequences)
    assert network.parts == parts
    cache, whole = empty_cache(network, sequences, 32), empty_cache(model, sequences, 32)
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 17)):
        assert_close(read(network, ids[:, start:end], cache), read(model, ids[:, start:end], whole))


def test_the_order_of_weights_in_memory_changes_nothing(make_model, bpe, ids, tmp_path):
    save_model(tmp_path, make_model(), bpe)
    fresh, loaded = (decoding.decoder(model.eval(), 4) for model in (make_model(), load_model(tmp_path)))
    assert_close(*(read(network, ids, empty_cache(network, len(ids), 17)) for network in (fresh, loaded)))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_vocabulary_of_any_size_is_read_whole(make_model, batch):
    for entries in (7, 64, 101):
        model = make_model(vocab_size=entries).eval()
        x_bc = mx.random.normal((batch, 32), key=mx.random.key(0))
        assert_close(decoding.decoder(model, 2).head(x_bc), model.head(x_bc))


@pytest.mark.parametrize("sequences", [1, 4])
def test_sequences_of_other_lengths_are_read_as_alone(make_model, ids, sequences):
    """One pass over the second of two sequences, which is behind the first."""
    model = make_model().eval()
    network = decoding.decoder(model, sequences)
    together = empty_cache(network, 2, 32)
    together.rows.lengths.clear()
    for length in (9, 4):
        alone = empty_cache(network, 1, 32)
        read(network, ids[:1, :length], alone)
        together.add(alone)
    logits = read(network, np.stack([ids[0, 9:12], ids[0, 4:7]]), together)
    assert_close(logits[0], model(mx.array(ids[:1, :12]))[0, 9:])
    assert_close(logits[1], model(mx.array(ids[:1, :7]))[0, 4:])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"num_samples": 2}])
def test_decoding_in_two_parts_gives_the_same_text(make_model, bpe, monkeypatch, settings):
    config = GenerationConfig(max_tokens=40, seed=5, **settings)  # past the last position
    prompt, model = bpe.encode("The duck swims"), make_model()
    made: list[list[tuple[int, list[int]]]] = []
    for count in (1, 2):
        monkeypatch.setattr(decoding, "part_count", lambda *_, count=count: count)
        running = Engine(model, bpe, config.num_samples)
        running.add(Request(prompt, config, ends=False))
        made.append([])
        while running.busy:
            made[-1] += [(piece.sample, [token.id for token in piece.tokens]) for _, piece in running.step()]
    assert made[0] == made[1]


def test_a_decoder_is_kept_until_the_weights_change(make_model, ids):
    """A text that is generated during training comes from the weights as they are then."""
    model = make_model().eval()
    first = decoding.decoder(model, 4)
    assert decoding.decoder(model, 4) is first
    norm, *_ = model.layers[0].stages()
    norm.weight = norm.weight + 1
    network = decoding.decoder(model, 4)
    assert network is not first
    assert_close(
        read(network, ids, empty_cache(network, len(ids), 17)), read(model, ids, empty_cache(model, len(ids), 17))
    )


LLAMA: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
LLAMA |= {"rms_norm_eps": 1e-5, "vocab_size": 300}
BIGCODE: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_inner": 64, "n_head": 2, "n_positions": 32}
BIGCODE |= {"layer_norm_epsilon": 1e-5, "vocab_size": 300}


@pytest.mark.parametrize(("name", "sizes"), [("llama", LLAMA), ("gpt_bigcode", BIGCODE)])
def test_a_network_with_other_blocks_is_left_whole(ids, name, sizes):
    """mlx-lm's blocks stay whole, even if their parts have the same names as ours."""
    architecture = models.architecture({"model_type": name})
    model = architecture.Model(architecture.ModelArgs(model_type=name, **sizes)).eval()
    assert_close(decoding.decoder(model, 4)(mx.array(ids)), model(mx.array(ids)))


@pytest.mark.parametrize(
    ("settings", "cores", "sequences", "count"),
    [
        ({}, 2, 8, 2),
        ({}, 2, 1, 1),  # the BLAS has the second core
        ({}, 1, 8, 1),
        ({"n_head": 3}, 8, 8, 1),  # not divisible
        ({"model_type": "qwen3"}, 2, 8, 2),
        ({"model_type": "qwen3", "n_kv_head": 3}, 2, 8, 1),
        ({"n_embd": 128, "n_head": 4}, 8, 8, 1),  # sooner done than divided
    ],
)
def test_networks_are_divided_where_it_pays(monkeypatch, settings, cores, sequences, count):
    monkeypatch.undo()
    monkeypatch.setattr(streams, "cores", lambda: cores)
    model = models.create(ModelConfig(vocab_size=300, **{"n_layer": 1, **settings}))
    assert decoding.part_count(model, sequences) == count
