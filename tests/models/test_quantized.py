"""Directories that mlx-lm has quantised can be opened and generate text. Damaged ones are refused."""

import dataclasses
import json
import shutil
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import quantize_model, save

from mlx_gpt import api, models
from mlx_gpt.config import GenerationConfig
from mlx_gpt.device import device
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request
from mlx_gpt.models import checks, quantized
from mlx_gpt.models.directory import load_model, save_model

PROMPTS = ("The duck swims", "Geese", "a pond and dives")


def test_packed_experts_are_not_taken_for_weights():
    """mlx-lm packs the experts of a mixture in a layer of its own."""
    layer = QuantizedSwitchLinear(64, 32, 2, False)
    assert quantized.unknown_layer(nn.Sequential(nn.QuantizedLinear(64, 32), layer)) == "layers.1"
    assert quantized.unknown_layer(nn.Sequential(nn.QuantizedLinear(64, 32), nn.QuantizedEmbedding(32, 64))) is None


def write_llama(folder, bpe):
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": bpe.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, eos_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(bpe.to_json())


@pytest.fixture(scope="module", params=["gpt2", "qwen3", "llama"])
def packed(request, make_model, bpe, tmp_path_factory):
    """A directory with 4 bits a weight, except for one layer that has 8."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        write_llama(folder / "plain", bpe)
    else:
        save_model(folder / "plain", make_model(model_type=request.param), bpe)
    model, tokenizer, config = cast(Any, mlx_lm.utils.load(str(folder / "plain"), return_config=True))

    def layers(name: str, layer: Any) -> Any:
        special = "1.mlp" in name and ("c_proj" in name or "down_proj" in name)
        return {"group_size": 32, "bits": 8, "mode": "affine"} if special else hasattr(layer, "to_quantized")

    model, config = quantize_model(model, config, 32, 4, quant_predicate=layers)
    save(folder / "packed", str(folder / "plain"), model, tokenizer, config)
    return folder / "packed"


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["packed", "plain"])
def test_weights_are_refused_if_they_take_more_memory_than_there_is(packed, monkeypatch, name, dtype):
    folder = packed.parent / name
    needed = sum(weight.nbytes for _, weight in tree_flatten(load_model(folder, dtype).parameters()))
    here = device()
    monkeypatch.setattr(checks, "device", lambda: dataclasses.replace(here, memory=needed + 20_000))
    load_model(folder, dtype)
    monkeypatch.setattr(checks, "device", lambda: dataclasses.replace(here, memory=needed - 1))
    with pytest.raises(UserError, match="can't hold them"):
        load_model(folder, dtype)


def test_the_logits_are_those_of_mlx_lm(packed, ids, eager):
    theirs, _ = cast(Any, mlx_lm.load(str(packed)))
    ours = load_model(packed)
    np.testing.assert_allclose(np.array(ours(mx.array(ids))), np.array(theirs(mx.array(ids))), atol=1e-5)
    assert mx.uint32 in {weight.dtype for _, weight in tree_flatten(ours.parameters())}
    assert models.n_params(ours) == models.n_params(load_model(packed.parent / "plain"))


def test_prompts_in_a_batch_are_continued_as_alone(packed, eager):
    model, tokenizer = api.load(packed)
    settings = GenerationConfig(temperature=0.0, repetition_penalty=1.0, max_tokens=6)
    alone = [
        api.generate(model, tokenizer, text, temperature=0.0, repetition_penalty=1.0, max_tokens=6) for text in PROMPTS
    ]
    requests = [Request(tokenizer.encode(text), settings) for text in PROMPTS]
    engine, texts = Engine(model, tokenizer, max_batch=3), dict.fromkeys(range(3), "")
    for request in requests:
        engine.add(request)
    while engine.busy:
        for request, piece in engine.step():
            texts[requests.index(request)] += piece.text
    assert list(texts.values()) == alone


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    change(config["quantization"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(bits=8), "with 8 bits in groups of 32"),
        (lambda q: q.update(group_size=64), "with 4 bits in groups of 64"),
        (lambda q: q.update(bits=7), "is quantised with 7 bits in groups of 32; mlx-gpt reads"),
        (lambda q: q.update(bits="four"), "is quantised with 'four' bits"),
        (lambda q: q.update(mode="mxfp4"), "quantised in a way that mlx-gpt does not read"),
        (lambda q: q.update(quant_method="fp8"), "quantised in a way that mlx-gpt does not read"),
    ],
    ids=["bits", "group", "odd bits", "no number", "mode", "method"],
)
def test_a_scheme_that_is_not_that_of_the_weights_is_refused(packed, tmp_path, change, said):
    shutil.copytree(packed, tmp_path / "packed")
    change_config(tmp_path / "packed", change)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "packed")
    assert said in str(caught.value)


def test_weights_without_their_scales_are_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "packed")
    path = str(tmp_path / "packed/model.safetensors")
    tensors = mx.load(path)
    mx.eval(tensors)
    del tensors[next(name for name in sorted(tensors) if name.endswith(".scales"))]
    mx.save_safetensors(path, tensors)
    with pytest.raises(UserError, match="has the type U32, but mlx-gpt reads only"):
        load_model(tmp_path / "packed")
