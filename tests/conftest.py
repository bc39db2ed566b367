"""Every model, tokenizer and text that the tests need: made here, small, and the same each time."""

import itertools
import json
import os
import random
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches a network
# The suite runs on the CPU, where equal means equal to the bit, in this process and in those that it starts. Tests
# marked `gpu` compare the GPU with it.
os.environ["MLX_GPT_DEVICE"] = "cpu"

import mlx_gpt.device  # noqa: F401, I001 - before mlx, so that a tuned BLAS can take its place

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from mlx_gpt.models import create
from mlx_gpt.config import ModelConfig
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.device import device
from mlx_gpt.models.directory import save_model
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import memory, planning

# A shell starts background jobs with these ignored, and tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the duck swims in a pond and dives for plants or snails while naïve geese — 鳥 — look on 🦆 don't they"


@pytest.fixture(scope="session")
def sentences():
    """300 short documents of the same few words."""
    words, draw = TEXT.split(), random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(5, 15))).capitalize() + ".\n" for _ in range(300)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, sentences):
    """A folder that trains as it is: 270 documents, and 30 to validate."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("".join(sentences[:270]), encoding="utf-8")
    (folder / "val.txt").write_text("".join(sentences[270:]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer():
    return Tokenizer.of_bytes()


@pytest.fixture(scope="session")
def bpe(sentences):
    """A byte-level BPE of 300 entries."""
    return Tokenizer.train(sentences, 300)


@pytest.fixture(scope="session")
def foreign(sentences):
    """A GPT-2-like tokenizer from elsewhere, with what such files bring along and without an end of text."""
    backend = HFTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences, trainer)
    backend.add_tokens([AddedToken("the duck"), AddedToken("鳥"), AddedToken("naïve")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(8)
    backend.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    return Tokenizer(HFTokenizer.from_str(backend.to_str()))


@pytest.fixture(params=["bytes", "bpe", "foreign"])
def tokenizer(request, byte_tokenizer, bpe, foreign):
    """Each kind of tokenizer in turn."""
    return {"bytes": byte_tokenizer, "bpe": bpe, "foreign": foreign}[request.param]


@pytest.fixture(scope="session")
def make_model(bpe):
    """Make a fresh tiny GPT-2: 2 layers, 2 heads, 32 wide, 32 positions, the vocabulary of `bpe`; or another network.

    No weight is near where training starts, so that each part of the network shows in what comes out.
    """

    def make(seed=0, **settings):
        sizes = {"vocab_size": bpe.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
        model = create(ModelConfig(**sizes | settings))
        draw = np.random.default_rng(seed)
        weights = []
        for name, weight in tree_flatten(model.parameters()):
            # Positions and blocks must be heard over the token itself, or the likeliest next token is always the last.
            spread = 0.5 if name.startswith("wpe") else 0.3 if name.startswith(("h.", "model.layers.")) else 0.2
            mean = 1 if weight.ndim == 1 and name.endswith("weight") else 0
            weights.append((name, mx.array(draw.normal(mean, spread, weight.shape).astype(np.float32))))
        model.update(tree_unflatten(weights))
        return device().accelerate(model)

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """A tiny GPT-2 to look at, as it is for use: a test that trains makes its own."""
    return make_model().eval()


@pytest.fixture(scope="session")
def with_template():
    """Write a model directory with a chat template. The model's tokens are bytes and the two ends of ChatML's turns."""

    def write(folder, make, template=CHATML):
        backend = Tokenizer.of_bytes().backend
        backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer = Tokenizer(backend, backend.token_to_id("<|im_end|>"))
        save_model(folder, make(tokenizer), tokenizer)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        return folder

    return write


@pytest.fixture(scope="session")
def saying(with_template):
    """Write a model directory whose answer to any message is this text; each byte of it decides the next."""

    def write(folder, text, n_positions):
        def make(tokenizer):
            size = tokenizer.vocab_size
            sizes = {"vocab_size": size, "n_layer": 1, "n_head": 2, "n_embd": size + 1, "n_positions": n_positions}
            model = create(ModelConfig(**sizes, model_type="qwen3", tie_embeddings=False))
            # The block adds nothing, and the head makes one token likely after each token.
            weights = {name: mx.zeros_like(weight) for name, weight in tree_flatten(model.parameters())}
            weights["model.embed_tokens.weight"] = mx.eye(size, size + 1)
            weights["model.norm.weight"] = mx.ones(size + 1)
            following = np.full(size, tokenizer.end_of_text)
            for before, after in itertools.pairwise(b"\n" + text):
                following[before] = after
            head = np.zeros((size, size + 1), np.float32)
            head[following, np.arange(size)] = 100
            weights["lm_head.weight"] = mx.array(head)
            model.update(tree_unflatten(list(weights.items())))
            return model

        return with_template(folder, make)

    return write


@pytest.fixture(scope="session")
def quacking(tmp_path_factory, saying):
    """A model directory with ChatML and a context of 128 bytes. Its answer to any message is "Quack."."""
    return saying(tmp_path_factory.mktemp("models") / "quacking", b"Quack.", 128)


@pytest.fixture(scope="session")
def rambling(tmp_path_factory, with_template, make_model):
    """A model directory with ChatML and a context of 256 bytes. Its answers are nonsense that depends on every byte."""
    return with_template(
        tmp_path_factory.mktemp("models") / "rambling",
        lambda tokenizer: make_model(vocab_size=tokenizer.vocab_size, n_positions=256),
    )


@pytest.fixture(scope="session")
def ids(bpe):
    """Token ids, (4, 17): the one shape that training is compiled for."""
    return np.random.default_rng(0).integers(0, bpe.vocab_size, (4, 17)).astype(np.int32)


@pytest.fixture(scope="session")
def weights_of():
    """The parameters of a model by name, as a copy in numpy."""

    def weights_of(model):
        return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}

    return weights_of


@pytest.fixture
def eager():
    """Nothing is compiled, which is the quicker way to try what need not be."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def unmeasured(monkeypatch):
    """Steps are not measured before a run, which takes longer than many a run here."""
    line = memory.Line((memory.Trial(1, 2**20, 2**20, 0, 0.01), memory.Trial(2, 2**21, 2**21, 0, 0.01)))
    monkeypatch.setattr(planning, "measure", lambda run, make_step, training: line)


@pytest.fixture
def make_corpus(tmp_path):
    """Write documents to a folder that `open_corpus` takes as it is."""

    def make(train, val=("What nobody has seen.\n",)):
        for side, documents in (("train", train), ("val", val)):
            lines = [json.dumps({"text": document}) + "\n" for document in documents]
            (tmp_path / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        return open_corpus(tmp_path)

    return make
