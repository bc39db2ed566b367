"""Model directories: what we write opens elsewhere, what others write opens here, and the rest is refused."""

import json
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from mlx_gpt.errors import UserError
from mlx_gpt.generation.stream import check_prompt
from mlx_gpt.models.directory import load_model, save_model
from mlx_gpt.models.tokenizer_files import load_tokenizer, read_tokenizer
from mlx_gpt.tokenizer import Tokenizer

TEXTS = [
    "The duck swims in a pond.",
    "  two  spaces,\ttabs\n\nand\r\nnew lines \n",
    "🦆 👩‍👩‍👧 emoji",
    "漢字かな交じり文 한국어",
    "naïve don't they'll 1234567 ½ — …",
    "NUL \0 and \x1b[0m",
]


def logits_of(model, ids):
    return np.array(model(mx.array(ids)))


def transformers_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    """Replace the tensors of a directory by those that `change` makes of them."""
    path = str(folder / "model.safetensors")
    tensors = mx.load(path)
    mx.eval(tensors)
    mx.save_safetensors(path, change(tensors), metadata={"format": "pt"})


# ---- ours elsewhere -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, bpe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, bpe)
    return folder


def test_transformers_opens_what_we_save(saved, model, ids):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(saved)
    np.testing.assert_allclose(transformers_logits(theirs, ids), logits_of(model, ids), atol=1e-4)


def test_mlx_lm_opens_what_we_save(saved, model, ids, bpe):
    theirs, tokenizer, *_ = mlx_lm.load(str(saved))
    np.testing.assert_allclose(logits_of(theirs, ids), logits_of(model, ids), atol=1e-4)
    assert [tokenizer.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]
    assert tokenizer.eos_token_ids == {bpe.end_of_text}


def test_our_tokenizers_give_the_same_ids_in_transformers(tokenizer, make_model, tmp_path):
    save_model(tmp_path, make_model(vocab_size=tokenizer.vocab_size), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_of_text


def test_our_weights_and_tokenizer_come_back_as_they_were(saved, model, bpe, weights_of):
    back = load_model(saved)
    before, after = weights_of(model), weights_of(back)
    assert back.args == model.args
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert load_tokenizer(saved, back).to_json() == bpe.to_json()


# ---- others' here ---------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(bpe):
    """A GPT-2 made by transformers, with weights far from those that training starts with."""
    torch.manual_seed(0)
    sizes = {"vocab_size": bpe.vocab_size, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    return model


def with_masks(dtype):
    masks = {f"transformer.h.{i}.attn.bias": mx.tri(32, dtype=mx.float32)[None, None].astype(dtype) for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": mx.array(-1e4) for i in range(2)}
    return lambda tensors: tensors | masks


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensors: tensors, id="as it writes today"),
        pytest.param(lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()}, id="no prefix"),
        pytest.param(lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, id="a head"),
        pytest.param(with_masks(mx.float32), id="masks"),
        pytest.param(with_masks(mx.bool_), id="boolean masks"),
        pytest.param(with_masks(mx.uint8), id="masks of bytes"),
    ],
)
def test_a_gpt2_from_transformers_opens_here(theirs, ids, tmp_path, change):
    theirs.save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    np.testing.assert_allclose(logits_of(load_model(tmp_path), ids), transformers_logits(theirs, ids), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_opens_as_float32(theirs, ids, tmp_path, dtype):
    theirs.to(dtype).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.wte.weight.dtype == mx.float32
    np.testing.assert_allclose(logits_of(model, ids), transformers_logits(theirs.float(), ids), atol=1e-4)


def test_the_token_that_begins_texts_is_kept(make_model, sentences, tmp_path):
    tokenizer = Tokenizer.train(sentences, 300)
    tokenizer.backend.add_special_tokens(["<s>"])
    begin = tokenizer.backend.token_to_id("<s>")
    tokenizer.backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    tokenizer = Tokenizer(tokenizer.backend)
    save_model(tmp_path, model := make_model(vocab_size=301), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<|endoftext|>")
    assert theirs("the duck").input_ids == check_prompt(model, load_tokenizer(tmp_path, model), "the duck")
    assert json.loads((tmp_path / "generation_config.json").read_text())["bos_token_id"] == begin


def test_a_model_says_which_id_ends_its_texts(saved, model):
    duck = Tokenizer.load(saved).encode("d")[0]
    edit_json(saved / "config.json", eos_token_id=duck)
    try:
        assert load_tokenizer(saved, model).end_of_text == duck
    finally:
        edit_json(saved / "config.json", eos_token_id=0)


# ---- mlx-lm's architectures ------------------------------------------------------------------------------------------


@pytest.fixture
def llama(bpe, tmp_path):
    """A directory with a llama made by transformers, and its model."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": bpe.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", model


def test_a_llama_from_transformers_opens_here(llama, ids):
    folder, theirs = llama
    np.testing.assert_allclose(logits_of(load_model(folder), ids), transformers_logits(theirs, ids), atol=1e-4)


def test_a_llama_that_we_save_is_the_one_that_we_read(llama, ids, bpe, tmp_path):
    folder, theirs = llama
    save_model(tmp_path / "saved", load_model(folder), bpe)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(saved) is type(theirs)
    np.testing.assert_allclose(transformers_logits(saved, ids), transformers_logits(theirs, ids), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "no tensor model.layers.2."),
        ({"hidden_size": 64}, "gives `hidden_size` as 64, but no tensor has that size"),
        ({"num_hidden_layers": 10**12}, "layers"),
        ({"num_attention_heads": None}, "can't be read as llama"),
    ],
    ids=str,
)
def test_a_llama_whose_config_belies_its_weights_is_refused(llama, changes, said):
    folder, _ = llama
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("model_type", ["no_such_model", "cache", "../gpt2", "x" * 10_000])
def test_an_architecture_that_nobody_has_is_refused(llama, model_type):
    """`cache` is a module of mlx-lm, but no model."""
    folder, _ = llama
    edit_json(folder / "config.json", model_type=model_type)
    with pytest.raises(UserError, match=r"^Neither mlx-gpt nor mlx-lm has a (language )?model of type .*\.$") as caught:
        load_model(folder)
    assert len(str(caught.value)) < 300


def test_without_mlx_lm_it_says_what_to_install(llama, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"A model of type llama needs mlx-lm: run `pip install -e '\.\[models\]'`"):
        load_model(llama[0])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(model, bpe, tmp_path):
    """A model directory that a test may damage."""
    save_model(tmp_path, model, bpe)
    return tmp_path


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, load_model(folder))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert str(folder) in sentence
    return sentence


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(damaged, name):
    (damaged / name).unlink()
    assert name in refusal(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:4], id="no header"),
        pytest.param(lambda data: data[:100], id="cut in the header"),
        pytest.param(lambda data: data[:-1], id="a byte short"),
        pytest.param(lambda data: (2**60).to_bytes(8, "little") + data[8:], id="a header beyond the file"),
        pytest.param(lambda data: data.replace(b"[0,", b"[9,", 1), id="offsets that overlap"),
    ],
)
def test_weights_that_are_damaged_are_refused(damaged, damage):
    path = damaged / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors is damaged or cut short" in refusal(damaged)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(damaged):
    header = {"wte.weight": {"dtype": "F32", "shape": [10**12, 32], "data_offsets": [0, 128 * 10**12]}}
    text = json.dumps(header).encode()
    (damaged / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "damaged" in refusal(damaged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"h.1.mlp.c_fc.bias": mx.zeros((127,))}, ["h.1.mlp.c_fc.bias", "(127,)", "(128,)"]),
        (lambda t: t | {"wte.weight": mx.zeros((9, 32))}, ["wte.weight", "(9, 32)", "(300, 32)"]),
        (lambda t: t | {"wte.weight": mx.zeros((0,))}, ["wte.weight", "(0,)", "(300, 32)"]),
        (lambda t: t | {"wte.weight": mx.zeros((300, 32), mx.int32)}, ["wte.weight", "I32"]),
        (lambda t: {n: a for n, a in t.items() if n != "ln_f.bias"}, ["no tensor ln_f.bias"]),
        (lambda t: t | {"h.0.attn.rotary": mx.zeros((2,))}, ["h.0.attn.rotary", "another architecture"]),
        (lambda t: t | {"lm_head.weight": t["wte.weight"] + 1}, ["lm_head.weight differs from wte.weight"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_tensor_that_does_not_fit_is_named(damaged, change, said):
    edit_weights(damaged, change)
    sentence = refusal(damaged)
    assert all(part in sentence for part in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "config.json lacks `hidden_size`"),
        ({"model_type": None}, "describes None"),
        ({"model_file": "modeling.py"}, "code of its own"),
        ({"quantization": {"bits": 4}}, "quantised"),
        ({"activation_function": "relu"}, "`activation_function` is 'relu'"),
        ({"n_inner": 64}, "`n_inner` is 64"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings` is False"),
        ({"n_head": 3}, "can't be shared"),
        ({"n_layer": 0}, "`n_layer`"),
        ({"n_layer": "2"}, "`n_layer`"),
        ({"n_layer": 3}, "h.2."),
        ({"n_layer": 10**12}, "layers"),
        ({"n_head": 10**30}, "`n_head`"),
        ({"vocab_size": 10**12}, "wte.weight"),
        ({"n_positions": 10**30}, "wpe.weight"),
        ({"n_embd": 2**40}, "wte.weight"),
        ({"layer_norm_epsilon": float("nan")}, "`layer_norm_epsilon`"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon`"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": []}, "layer_norm_epsilon"),
        ({"resid_pdrop": 1.5}, "`resid_pdrop`"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_this_gpt2_is_refused(damaged, changes, said):
    edit_json(damaged / "config.json", **changes)
    assert said in refusal(damaged)


@pytest.mark.parametrize(("name", "size"), [("wte.weight", "vocab_size"), ("wpe.weight", "n_positions")])
def test_absurd_sizes_are_refused_even_without_the_tensor_that_belies_them(damaged, name, size):
    edit_json(damaged / "config.json", **{size: 10**12})
    edit_weights(damaged, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    assert f"has no tensor {name}" in refusal(damaged)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "3", "null", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}"], ids=lambda text: text[:4]
)
def test_a_config_that_is_no_json_object_is_refused(damaged, text):
    (damaged / "config.json").write_text(text)
    assert "config.json is not" in refusal(damaged)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_no_text_is_refused(damaged, name):
    (damaged / name).write_bytes(b"\xff\xfe{\x00}\x00")
    assert f"{name} is not" in refusal(damaged)


def test_a_tokenizer_that_the_weights_were_not_trained_with_is_refused(damaged, sentences):
    other = Tokenizer.train(sentences[:100], 290)
    (damaged / "tokenizer.json").write_text(other.to_json())
    assert "trained with another tokenizer" in refusal(damaged)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        read_tokenizer(damaged)


def test_a_tokenizer_that_transformers_wrote_again_is_the_same(damaged, model, bpe):
    before = (damaged / "tokenizer.json").read_text()
    transformers.AutoTokenizer.from_pretrained(damaged).save_pretrained(damaged)
    assert (damaged / "tokenizer.json").read_text() != before
    assert load_tokenizer(damaged, model).encode("duck") == bpe.encode("duck")


def test_a_tokenizer_with_more_entries_than_the_weights_is_refused(damaged, sentences):
    edit_weights(damaged, dict)  # which drops the fingerprint of the tokenizer
    bigger = Tokenizer.train(sentences, 310)
    (damaged / "tokenizer.json").write_text(bigger.to_json())
    assert "the tokenizer has 310 entries and the weights 300" in refusal(damaged)


@pytest.mark.parametrize("end_of_text", [-1, 2**40, 10**30, "x", [0], None, 299], ids=str)
def test_an_end_of_text_that_is_no_id_means_the_usual_one(damaged, model, end_of_text):
    edit_json(damaged / "config.json", eos_token_id=end_of_text)
    expected = 299 if end_of_text == 299 else 0
    assert load_tokenizer(damaged, model).end_of_text == expected
