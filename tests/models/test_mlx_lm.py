"""Directories of llama (mlx-lm's network) and qwen3 (ours) that transformers wrote open, write, train and save."""

import dataclasses
import json
import resource
import shutil
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_gpt import generate, load
from mlx_gpt.config import GenerationConfig, TrainingConfig
from mlx_gpt.device import device
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request
from mlx_gpt.generation.stop_strings import Token
from mlx_gpt.models import checks
from mlx_gpt.models.directory import config_of, load_model, save_model
from mlx_gpt.models.tokenizer_files import load_tokenizer
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.optim import make_optimizer
from mlx_gpt.training.loop import make_step

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# A base other than the default, or a reader that overlooks it would go unnoticed.
PLAIN = {"rope_theta": 500.0, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": PLAIN}),
    "llama, tied and scaled": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"rope_parameters": PLAIN}),
    "qwen3, tied": (
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        {"rope_parameters": PLAIN, "tie_word_embeddings": True},
    ),
}
PROMPTS = ("The duck swims", "Geese", "a pond and dives for plants or snails while naïve geese — 鳥")
GREEDY = GenerationConfig(temperature=0.0, repetition_penalty=1.0, max_tokens=12)


@dataclasses.dataclass
class Foreign:
    """A model directory that transformers wrote, and the model that it wrote."""

    folder: str
    model: transformers.PreTrainedModel

    def logits(self, ids):
        """The logits that transformers computes."""
        with torch.no_grad():
            return self.model(torch.tensor(ids)).logits.numpy()


def write(folder, kind, bpe):
    """Write such a directory. No weight is near where training starts, so that each shows in the logits."""
    make_config, make_model, settings = KINDS[kind]
    torch.manual_seed(0)
    model = make_model(make_config(**SIZES, **settings, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(bpe.to_json())
    return Foreign(folder, model)


@pytest.fixture(scope="module", params=KINDS)
def foreign(request, tmp_path_factory, bpe):
    return write(tmp_path_factory.mktemp("foreign"), request.param, bpe)


@pytest.fixture
def opened(foreign):
    """The same network here, with its tokenizer."""
    return load(foreign.folder)


def logits_of(model, ids):
    return np.array(model(mx.array(ids)))


# ---- it computes the same -------------------------------------------------------------------------------------------


def test_the_logits_are_those_of_transformers(foreign, ids):
    model = load_model(foreign.folder)
    assert {weight.dtype for _, weight in tree_flatten(model.parameters())} == {mx.float32}
    np.testing.assert_allclose(logits_of(model, ids), foreign.logits(ids), atol=1e-4)


def test_a_config_that_does_not_say_whether_the_head_is_tied_means_what_the_tensors_say(foreign, ids, tmp_path):
    shutil.copytree(foreign.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(logits_of(load_model(tmp_path), ids), foreign.logits(ids), atol=1e-4)


def test_weights_in_several_files_are_one_model(foreign, ids, tmp_path):
    foreign.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    np.testing.assert_allclose(logits_of(load_model(tmp_path), ids), foreign.logits(ids), atol=1e-4)


# ---- it generates ---------------------------------------------------------------------------------------------------


def test_the_greedy_text_is_that_of_transformers(foreign, opened):
    model, tokenizer = opened
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        theirs = foreign.model.generate(
            torch.tensor([ids]),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(ids)),
        )[0, len(ids) :]
        made = generate(model, tokenizer, prompt, **dataclasses.asdict(GREEDY))
        assert made == tokenizer.decode([token for token in theirs.tolist() if token != tokenizer.end_of_text])


def decode(opened, requests, max_batch):
    """The ids and log-probabilities of each request's tokens."""
    model, tokenizer = opened
    engine = Engine(model, tokenizer, max_batch)
    made: dict[int, list[Token]] = {}
    for request in requests:
        engine.add(request)
    while engine.busy:
        for request, piece in engine.step():
            made.setdefault(requests.index(request), []).extend(piece.tokens)
    return [[(token.id, token.logprob) for token in made[i]] for i in range(len(requests))]


def test_prompts_in_a_batch_are_decoded_as_alone(opened):
    tokenizer = opened[1]
    requests = [Request(tokenizer.encode(prompt), GREEDY, alternatives=1, ends=False) for prompt in PROMPTS * 2]
    together = decode(opened, requests, max_batch=4)  # the last two come when others have ended
    for request, told in zip(requests, together, strict=True):
        [alone] = decode(opened, [request], max_batch=1)
        assert [token for token, _ in told] == [token for token, _ in alone]
        assert [logprob for _, logprob in told] == pytest.approx([logprob for _, logprob in alone], abs=1e-4)
        assert len(told) == GREEDY.max_tokens


# ---- it trains ------------------------------------------------------------------------------------------------------

TRAINING = TrainingConfig(batch_size=4, gradient_accumulation_steps=1, seq_len=16, max_grad_norm=0.0)


def trainer(model, **changes):
    """The optimizer and the step for a model."""
    training = dataclasses.replace(TRAINING, **changes)
    optimizer = make_optimizer(training, model)
    objective = device().accelerate(OBJECTIVES["documents"]())
    return optimizer, make_step(model.train(), optimizer, objective, training, device())


@pytest.fixture
def batch(ids):
    return mx.array(ids), mx.ones((4, 16))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed twice"])
def test_the_gradients_are_those_of_pytorch(foreign, opened, ids, batch, eager, recompute):
    optimizer, step = trainer(opened[0], grad_checkpoint=recompute)
    loss, norm = step(0, 1e-3, [batch]).numbers()
    foreign.model.zero_grad()
    tokens = torch.tensor(ids, dtype=torch.long)
    logits = foreign.model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    theirs = {name: weight.grad.numpy() for name, weight in foreign.model.named_parameters()}
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert norm == pytest.approx(np.sqrt(sum((gradient**2).sum() for gradient in theirs.values())), rel=1e-4)
    state = {name: array for name, array in tree_flatten(optimizer.state) if name.endswith(".m")}
    ours = {name.split(".", 2)[2].removesuffix(".m"): np.array(m) / (1 - TRAINING.beta1) for name, m in state.items()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        np.testing.assert_allclose(ours[name], gradient, atol=1e-5 * abs(gradient).max() + 1e-6, err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss(opened, batch, eager, precision):
    _, step = trainer(opened[0], precision=precision)
    losses = [step(number, 1e-2, [batch]).loss.item() for number in range(20)]
    assert losses[-1] < losses[0] - 1


# ---- it goes elsewhere ----------------------------------------------------------------------------------------------


def test_what_is_trained_here_opens_in_transformers(foreign, opened, ids, batch, eager, tmp_path):
    model, tokenizer = opened
    _, step = trainer(model)
    step(0, 1e-2, [batch])
    save_model(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is type(foreign.model)
    trained = logits_of(model.eval(), ids)
    assert not np.allclose(trained, foreign.logits(ids), atol=0.01)
    np.testing.assert_allclose(Foreign(tmp_path, theirs.eval()).logits(ids), trained, atol=1e-4)
    again = load_model(tmp_path)
    np.testing.assert_allclose(logits_of(again, ids), trained, atol=1e-5)
    assert load_tokenizer(tmp_path, again).to_json() == tokenizer.to_json()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory, bpe):
    return write(tmp_path_factory.mktemp("sound"), "llama", bpe).folder


@pytest.fixture
def damaged(sound, tmp_path):
    """A llama of its own for each test to damage."""
    return shutil.copytree(sound, tmp_path / "llama")


def refusal(folder):
    """The sentence, which has to come soon and without taking memory for what is not there."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError) as caught:
        load(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert sentence.endswith(".")
    assert len(sentence) < len(str(folder)) + 350
    assert grown * (1 if sys.platform == "darwin" else 1024) < 50e6
    assert time.perf_counter() - started < 10
    return sentence


def set_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def set_tensors(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_code_that_config_json_names_for_transformers_is_never_read(damaged):
    """Phi-3's directories name such files, although every library has its own code for them."""
    set_config(damaged, auto_map={"AutoModel": "evil.Model"})
    model = load_model(damaged)
    assert "auto_map" not in config_of(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "no tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "a tensor model.layers.1."),
        ({"num_hidden_layers": 100}, "gives `num_hidden_layers` as 100, but the 21 tensors beside it are too few"),
        ({"num_hidden_layers": 10**12}, "too few or too small"),
        ({"num_hidden_layers": -1}, "can't be read as llama"),
        ({"num_hidden_layers": "two"}, "can't be read as llama"),
        ({"num_hidden_layers": "gone"}, "config.json lacks `num_hidden_layers`"),
        ({"vocab_size": 299}, "gives `vocab_size` as 299, but no tensor has that size"),
        ({"vocab_size": 10**12}, "gives `vocab_size` as"),
        ({"vocab_size": [300]}, "gives `vocab_size` as [300], but no tensor has that size"),
        ({"vocab_size": "gone"}, "gives `vocab_size` as None, but no tensor has that size"),
        ({"hidden_size": 2**40}, "gives `hidden_size` as"),
        ({"hidden_size": 64}, "embed_tokens.weight has shape (300, 32), config.json asks for (300, 64)"),
        ({"intermediate_size": 2**40}, "can't be read as llama"),
        ({"intermediate_size": 65}, "mlp"),
        ({"num_attention_heads": 10**9}, "`num_attention_heads`"),
        ({"num_attention_heads": 0}, "can't be read as llama"),
        ({"head_dim": 10**9}, "`head_dim`"),
        ({"head_dim": -8}, "can't be read as llama"),
        ({"num_key_value_heads": 3}, "has shape"),
        ({"layer_types": ["sliding_attention"] * 2}, "can't be read as llama"),
        ({"rms_norm_eps": "gone"}, "config.json lacks `rms_norm_eps`"),
        ({"max_position_embeddings": "many"}, "can't be read as llama"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "`rope_parameters` for each kind of layer"),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3"}}, "can't be read as llama: 'factor'."),
        ({"rope_parameters": LLAMA3 | {"rope_type": "spiral"}}, "Unsupported RoPE type spiral"),
        ({"model_file": "evil.py"}, "code of its own"),
        ({"model_type": "no_such_model", "auto_map": {"AutoModel": "evil.Model"}}, "a model of type no_such_model"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"model_type": "../x"}, "a model of type ../x"),
        ({"model_type": "..utils"}, "a model of type ..utils"),
        ({"model_type": "utils"}, "a model of type utils"),
        ({"model_type": "base"}, "a language model of type base"),
        ({"model_type": "cache"}, "a language model of type cache"),
        ({"model_type": "no_such_model"}, "a model of type no_such_model"),
        ({"model_type": "llama\n\x1b[31m"}, "a model of type"),
        ({"model_type": ""}, "a model of type"),
        ({"model_type": ["llama"]}, "needs a `model_type`"),
        ({"model_type": "qwen3"}, "no tensor model.layers.0.self_attn."),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_of_these_weights_is_refused(damaged, changes, said):
    set_config(damaged, **changes)
    assert said in refusal(damaged)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {n: a for n, a in t.items() if n != "model.norm.weight"}, "no tensor model.norm.weight"),
        (lambda t: {n: a for n, a in t.items() if n != "lm_head.weight"}, "no tensor lm_head.weight"),
        (lambda t: t | {"model.norm.weight": np.zeros(31, np.float32)}, "(31,), config.json asks for (32,)"),
        (lambda t: t | {"model.extra": np.zeros(3, np.float32)}, "a tensor model.extra"),
        (lambda t: t | {"model.layers.0.mlp.up_proj.weight": np.zeros((64, 4), np.uint32)}, "U32"),
        (lambda t: {}, "gives `vocab_size` as"),
    ],
    ids=["a norm is missing", "the head is missing", "a wrong shape", "one too many", "packed integers", "none at all"],
)
def test_tensors_that_do_not_fit_are_refused(damaged, change, said):
    set_tensors(damaged, change)
    assert said in refusal(damaged)


def test_weights_that_do_not_fit_into_memory_are_refused(damaged, monkeypatch):
    small = dataclasses.replace(device(), memory=100_000)
    monkeypatch.setattr(checks, "device", lambda: small)
    assert "can't hold them: take a smaller model" in refusal(damaged)


def test_a_directory_without_safetensors_is_refused(damaged):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    assert "has no model.safetensors" in refusal(damaged)


def test_a_model_that_remembers_something_else_says_so(bpe):
    class Recurrent(nn.Module):
        model_type = "mamba"
        args = transformers.MambaConfig(vocab_size=300)

        def __init__(self):
            super().__init__()
            self.layers = [nn.Identity()]

        def make_cache(self):
            return [object()]

    with pytest.raises(UserError, match="A model of type mamba can't generate here"):
        Engine(Recurrent(), bpe)


def test_without_mlx_lm_it_says_what_to_install(damaged, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install -e '.[models]'" in refusal(damaged)
