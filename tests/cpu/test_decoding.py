"""Parts of a network, computed side by side, are the network."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_gpt.generation.parts import GPTInParts, part_count

from mlx_gpt.config import GenerationConfig, ModelConfig
from mlx_gpt.generation import engine, parts
from mlx_gpt.models.directory import load_model, save_model


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)


def empty_cache(network, texts, capacity):
    cache = engine.make_cache(network, texts, capacity)
    cache.rows.begin(texts)
    return cache


@pytest.mark.parametrize("count", [1, 2])
def test_parts_read_as_the_network_does(model, ids, count):
    network = GPTInParts(model, count)
    cache, whole = empty_cache(network, len(ids), 32), empty_cache(model, len(ids), 32)
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 17)):
        tokens = mx.array(ids[:, start:end])
        assert_close(engine.read(network, tokens, cache), engine.read(model, tokens, whole))


def test_the_order_of_weights_in_memory_changes_nothing(make_model, bpe, ids, tmp_path):
    save_model(tmp_path, make_model(), bpe)
    loaded = load_model(tmp_path)
    tokens = mx.array(ids)
    fresh, other = (GPTInParts(each, 2) for each in (make_model(), loaded))
    assert_close(*(engine.read(each, tokens, empty_cache(each, len(ids), 17)) for each in (fresh, other)))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_vocabulary_of_any_size_is_read_whole(make_model, batch):
    for entries in (7, 64, 101):
        model = make_model(vocab_size=entries)
        x_bc = mx.random.normal((batch, 32), key=mx.random.key(0))
        network = GPTInParts(model, 2)
        assert_close(network.head(x_bc), model.head(x_bc))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"num_samples": 2}])
def test_decoding_in_two_parts_gives_the_same_text(model, bpe, monkeypatch, settings):
    config = GenerationConfig(max_tokens=40, seed=5, **settings)  # past the last position
    prompt = bpe.encode("The duck swims")
    made: list[list[tuple[int, list[int]]]] = []
    for count in (1, 2):
        monkeypatch.setattr(parts, "part_count", lambda *_, count=count: count)
        running = engine.Engine(model, bpe, config.num_samples)
        running.add(engine.Request(prompt, config, ends=False))
        made.append([])
        while running.busy:
            made[-1] += [(piece.sample, [token.id for token in piece.tokens]) for _, piece in running.step()]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("settings", "cores", "texts", "count"),
    [
        ({}, 2, 8, 2),
        ({}, 2, 1, 1),  # the BLAS has the second core
        ({}, 1, 8, 1),
        ({"n_head": 3}, 8, 8, 1),  # not divisible
        ({"n_embd": 128, "n_head": 4}, 8, 8, 1),  # sooner done than divided
    ],
)
def test_networks_are_divided_where_it_pays(settings, cores, texts, count):
    assert part_count(ModelConfig(300, **settings), cores, texts) == count
