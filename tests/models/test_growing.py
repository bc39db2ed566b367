"""A model can get new tokens, and everything that it knew stays as it was."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import transformers
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer as mlx_lm_tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing

from mlx_gpt import models
from mlx_gpt.chat_template import CHATML, ChatTemplate
from mlx_gpt.errors import UserError
from mlx_gpt.models.directory import load_model, save_model
from mlx_gpt.models.growing import grow_vocabulary
from mlx_gpt.models.tokenizer_files import load_tokenizer
from mlx_gpt.tokenizer import Tokenizer

NETWORKS = {"gpt2": {}, "qwen3": {"model_type": "qwen3"}, "untied": {"model_type": "qwen3", "tie_embeddings": False}}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Does the duck swim?"},
    {"role": "assistant", "content": "In a pond."},
    {"role": "user", "content": "And the geese?"},
]


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
def test_the_old_logits_stay_to_the_bit(make_model, sizes, ids):
    model = make_model(**sizes)
    before = np.array(model(mx.array(ids)))
    grow_vocabulary(model, [300, 301], seed=0)
    after = np.array(model(mx.array(ids)))
    assert after.shape == (4, 17, 302)
    assert np.array_equal(after[..., :300], before)
    # The new tokens are about as likely as the average known token, and differ from each other.
    assert np.abs(after[..., 300:].mean(-1) - before.mean(-1)).max() < before.std()
    assert not np.array_equal(after[..., 300], after[..., 301])


def test_the_new_rows_are_a_function_of_the_seed(make_model):
    grown = [make_model() for _ in range(3)]
    for model, seed in zip(grown, (1, 1, 2), strict=True):
        grow_vocabulary(model, [300, 301], seed)
    rows = [np.array(model.wte.weight)[300:] for model in grown]
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_a_head_with_spare_rows_keeps_its_size(make_model, ids):
    model = make_model(vocab_size=304)
    before = np.array(model(mx.array(ids)))
    grow_vocabulary(model, [300, 301], seed=0)
    after = np.array(model(mx.array(ids)))
    assert np.array_equal(after[..., [*range(300), 302, 303]], before[..., [*range(300), 302, 303]])
    assert not np.array_equal(after[..., 300], before[..., 300])


def test_positions_do_not_grow_with_a_vocabulary_of_their_size(make_model):
    model = make_model(vocab_size=32)
    grow_vocabulary(model, [32, 33], seed=0)
    assert model.wpe.weight.shape[0] == 32
    assert models.vocab_size(model) == 34


@pytest.mark.parametrize("sizes", NETWORKS.values(), ids=NETWORKS)
def test_layers_do_not_grow_with_a_vocabulary_of_their_width(make_model, sizes, ids):
    model = make_model(vocab_size=128, **sizes)  # as many entries as an MLP has units
    before = np.array(model(mx.array(ids % 128)))
    shapes = {name: weight.shape for name, weight in tree_flatten(model.layers)}
    grown = grow_vocabulary(model, [128, 129], seed=0)
    assert {name: weight.shape for name, weight in tree_flatten(model.layers)} == shapes
    assert len(grown) == 1 + (not sizes.get("tie_embeddings", True))
    assert np.array_equal(np.array(model(mx.array(ids % 128)))[..., :128], before)


class Odd(nn.Module):
    """A network whose head has an unknown name."""

    def __init__(self, args):
        super().__init__()
        self.args, self.layers = args, []
        self.wte, self.decoder = nn.Embedding(300, 32), nn.Linear(32, 300)

    def __call__(self, inputs_bt, cache=None):
        return self.decoder(self.wte(inputs_bt))


def test_a_head_under_an_unknown_name_is_refused(make_model):
    with pytest.raises(UserError, match="vocabulary can't grow"):
        grow_vocabulary(Odd(make_model().args), [300, 301], seed=0)


def test_a_quantised_embedding_is_refused(make_model):
    model = make_model(model_type="qwen3", tie_embeddings=False)
    nn.quantize(model, 32, 4, class_predicate=lambda name, layer: name.endswith("embed_tokens"))
    with pytest.raises(UserError, match=r"The weights are quantised, so .* before it was quantised"):
        grow_vocabulary(model, [300, 301], seed=0)


def test_a_plain_embedding_beside_quantised_layers_grows(make_model, ids):
    model = make_model(model_type="qwen3")
    nn.quantize(model, 32, 4, class_predicate=lambda name, layer: ".layers." in name and isinstance(layer, nn.Linear))
    before = np.array(model(mx.array(ids)))
    grow_vocabulary(model, [300, 301], seed=0)
    assert np.array_equal(np.array(model(mx.array(ids)))[..., :300], before)


@pytest.fixture
def directory(tmp_path, make_model, foreign):
    """A directory of a model whose tokenizer, from elsewhere, was given ChatML."""
    tokenizer = Tokenizer(type(foreign.backend).from_str(foreign.to_json()))
    model = make_model(vocab_size=tokenizer.vocab_size)
    tokenizer.converse(CHATML)
    grow_vocabulary(model, tokenizer.added, seed=0)
    save_model(tmp_path / "model", model, tokenizer)
    return tmp_path / "model"


def test_a_directory_reads_as_it_was_written(directory):
    model = load_model(directory)
    tokenizer = load_tokenizer(directory, model)
    assert models.vocab_size(model) == tokenizer.vocab_size
    names = {tokenizer.backend.id_to_token(token) for token in tokenizer.ends}
    assert names == {"<|endoftext|>", "<|im_end|>"}
    assert tokenizer.backend.id_to_token(tokenizer.end_of_text) == "<|endoftext|>"
    assert tokenizer.added == ()
    save_model(directory.parent / "again", model, tokenizer)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (directory.parent / "again" / name).read_text() == (directory / name).read_text()


def test_transformers_and_mlx_lm_make_the_same_prompt_and_end_at_the_same_tokens(directory):
    ours = load_tokenizer(directory, load_model(directory))
    template: Any = ChatTemplate.of(ours)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert template.ids(MESSAGES, ours) == list(expected)
    assert theirs.eos_token == "<|im_end|>"
    config = json.loads((directory / "generation_config.json").read_text())
    assert config["eos_token_id"] == [theirs.convert_tokens_to_ids(n) for n in ("<|im_end|>", "<|endoftext|>")]
    assert transformers.GenerationConfig.from_pretrained(directory).eos_token_id == config["eos_token_id"]
    mlx_lm = mlx_lm_tokenizer(directory, eos_token_ids=config["eos_token_id"])
    assert mlx_lm.apply_chat_template(MESSAGES, add_generation_prompt=True) == list(expected)
    assert set(mlx_lm.eos_token_ids) == ours.ends


def test_a_template_of_one_s_own_is_kept_with_its_tokens(directory):
    """In Llama 3, for example, the end of a turn has another name, and the end of a document comes first."""
    own = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    config = {"chat_template": own, "bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    end, pad = (Tokenizer.load(directory).backend.token_to_id(name) for name in ("<|endoftext|>", "<pad>"))
    generation = {"eos_token_id": [end, pad], "bos_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = load_tokenizer(directory, model := load_model(directory))
    assert tokenizer.ends >= {end, pad}
    save_model(directory.parent / "again", model, tokenizer)
    saved = json.loads((directory.parent / "again/tokenizer_config.json").read_text())
    assert (saved["chat_template"], saved["bos_token"], saved["eos_token"]) == (own, "<s>", "<|endoftext|>")
    again = load_tokenizer(directory.parent / "again", model)
    assert (again.ends, again.end_of_text) == (tokenizer.ends, end)


def test_the_tokenizers_own_end_of_a_text_ends_an_answer_too(directory):
    """Some models name it in tokenizer_config.json only."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    tokenizer = load_tokenizer(directory, load_model(directory))
    assert tokenizer.backend.token_to_id("<pad>") in tokenizer.ends


def test_special_tokens_that_the_model_does_not_know_are_left_out(directory):
    """Gemma 3's files for text have a token for images, which has no row in the embedding."""
    known = load_tokenizer(directory, model := load_model(directory))
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    image = {"id": known.vocab_size, "content": "<image>", "special": True}
    content["added_tokens"].append(content["added_tokens"][-1] | image)
    path.write_text(json.dumps(content))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": known.vocab_size}))
    tokenizer = load_tokenizer(directory, model)
    assert tokenizer.backend.get_vocab() == known.backend.get_vocab()
    assert tokenizer.encode("<image>", special=True) == known.encode("<image>", special=True)
    content["added_tokens"][-1]["special"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"they don't belong together|trained with another"):
        load_tokenizer(directory, model)


@pytest.mark.parametrize("role", ["begins a text", "ends a text", "is in the template"])
def test_a_special_token_that_the_model_needs_is_not_left_out(directory, role):
    known = load_tokenizer(directory, model := load_model(directory))
    content = json.loads((directory / "tokenizer.json").read_text())
    unknown = {"id": known.vocab_size, "content": "<odd>", "special": True}
    content["added_tokens"].append(content["added_tokens"][-1] | unknown)
    if role == "begins a text":
        backend = HFTokenizer.from_str(json.dumps(content))
        backend.post_processor = TemplateProcessing("<odd> $A", special_tokens=[("<odd>", known.vocab_size)])
        content = json.loads(backend.to_str())
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": known.vocab_size}
    if role == "ends a text":
        (directory / "generation_config.json").unlink()
        config["eos_token_id"] = known.vocab_size
    (directory / "config.json").write_text(json.dumps(config))
    if role == "is in the template":
        (directory / "chat_template.jinja").write_text("<odd>" + CHATML)
    with pytest.raises(UserError, match=r"they don't belong together|trained with another"):
        load_tokenizer(directory, model)


def test_a_tokenizer_with_gaps_is_refused(foreign):
    content = json.loads(foreign.to_json())
    content["added_tokens"], content["post_processor"] = [], None
    vocab = content["model"]["vocab"]
    vocab["<|endoftext|>"] = len(vocab)
    vocab["gap"] = len(vocab) + 1
    tokenizer = Tokenizer(type(foreign.backend).from_str(json.dumps(content)), vocab["<|endoftext|>"])
    with pytest.raises(UserError, match="gaps between its ids"):
        tokenizer.converse(CHATML)
