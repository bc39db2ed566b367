"""A model learns the assistant's answers from conversations, and gives them in every program that opens it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.processors import TemplateProcessing

from mlx_gpt import models
from mlx_gpt.api import load
from mlx_gpt.chat_template import CHATML, ChatTemplate
from mlx_gpt.config import GenerationConfig, TrainingConfig
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.packing import PackedWindows
from mlx_gpt.data.tokens import ID
from mlx_gpt.device import device
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request
from mlx_gpt.models.directory import save_model
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.serving.models import load_models
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.tokenizer_training import END_OF_TURN, START_OF_TURN
from mlx_gpt.training import checkpoint

from .conftest import refusal

FACTS = {"duck": "pond", "goose": "lake", "swan": "river"}
SIZES = {"n_positions": 96, "seq_len": 80, "batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.02}


def ask(bird):
    return [{"role": "user", "content": f"{bird}?"}]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A folder of conversations about three birds, of one turn and of two."""
    folder = tmp_path_factory.mktemp("talks")
    answered = [[*ask(bird), {"role": "assistant", "content": place}] for bird, place in FACTS.items()]
    train = [*answered, *(one + other for one in answered for other in answered if one != other)] * 3
    for split, rows in (("train", train), ("val", answered)):
        lines = [json.dumps({"messages": row}) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def learn(train, talks):
    """Train on the conversations."""
    return lambda out, **settings: train(out, data=str(talks), **SIZES | settings)


def greedy(folder, bird):
    """The model's answer, by the engine that every command uses, and the reason why it ended."""
    model, tokenizer = load(folder)
    template: Any = ChatTemplate.of(tokenizer)
    prompt = template.ids(ask(bird), tokenizer)
    config = GenerationConfig(temperature=0, repetition_penalty=1.0, max_tokens=12)
    engine = Engine(model, tokenizer)
    engine.add(Request(prompt, config))
    pieces = []
    while engine.busy:
        pieces += [piece for _, piece in engine.step()]
    return "".join(piece.text for piece in pieces), pieces[-1].reason


def test_it_answers_everywhere_and_stops_there(learn):
    learn("run", max_steps=100, max_epochs=99, learning_rate=0.01, dropout=0.0, eval_every=100, save_every=100)
    for bird, place in FACTS.items():
        assert greedy("run/final", bird) == (place, "end")
    theirs = transformers.GPT2LMHeadModel.from_pretrained("run/final").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained("run/final")
    prompt = tokenizer.apply_chat_template(ask("swan"), add_generation_prompt=True, return_tensors="pt")
    made = theirs.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(made) == "river<|im_end|>"
    model, tokenizer = mlx_lm.load("run/final")[:2]
    prompt = tokenizer.apply_chat_template(ask("goose"), add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=12) == "lake"


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_a_stopped_and_resumed_run_ends_as_the_straight_one(learn, stop_after):
    learn("whole", max_steps=12)
    assert learn("half", max_steps=12, stop_after=stop_after).step == stop_after
    assert learn("half", max_steps=12, resume="half").finished
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert Path("half", name).read_bytes() == Path("whole", name).read_bytes()
    last = [checkpoint.all_checkpoints(Path(run))[-1] / "optimizer.safetensors" for run in ("half", "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_model_without_the_tokens_grows_and_its_run_resumes(learn, make_model, foreign):
    save_model(Path("base"), make_model(vocab_size=foreign.vocab_size, n_positions=96), foreign)
    lines = learn("whole", init_from="base", max_steps=4).lines
    assert "base has no chat template: it gets ChatML and the tokens <|im_start|>, <|im_end|>." in lines
    learn("half", init_from="base", max_steps=4, stop_after=2)
    learn("half", init_from="base", max_steps=4, resume="half")
    final = "final/model.safetensors"
    assert Path("half", final).read_bytes() == Path("whole", final).read_bytes()
    assert load_file(Path("whole", final))["wte.weight"].shape[0] == foreign.vocab_size + 2
    assert json.loads(Path("whole/final/config.json").read_text())["vocab_size"] == foreign.vocab_size + 2


def test_adapters_of_a_model_that_converses_converse(learn, make_model):
    talking = Tokenizer.of_bytes()
    talking.converse(CHATML)
    save_model(Path("base"), make_model(vocab_size=talking.vocab_size, n_positions=96), talking)
    learn("run", init_from="base", max_steps=1, lora_rank=4)
    folder = Path("run/final/adapters")
    [served] = load_models([folder], max_batch=1).values()
    assert served.template
    assert greedy(folder, "swan") == greedy("run/final", "swan")


@pytest.mark.parametrize("kind", [{}, {"model_type": "qwen3", "tie_embeddings": False}], ids=["gpt2", "qwen3"])
def test_adapters_beside_a_vocabulary_that_grew_are_resumed_and_open_everywhere(learn, make_model, foreign, kind):
    save_model(Path("base"), make_model(vocab_size=foreign.vocab_size, n_positions=96, **kind), foreign)
    options = {"init_from": "base", "max_steps": 4, "lora_rank": 4}
    learn("whole", **options)
    half = learn("half", stop_after=2, **options)
    assert any(
        re.search(r"adapters of rank 4 and all of (model\.)?(wte|embed_tokens)\.weight", line) for line in half.lines
    )
    learn("half", resume="half", **options)
    for folder in ("final", "best"):
        for name in ("model.safetensors", "config.json"):
            assert Path("half", folder, name).read_bytes() == Path("whole", folder, name).read_bytes()
        assert models.vocab_size(load(f"half/{folder}")[0]) == foreign.vocab_size + 2
    newest = checkpoint.all_checkpoints(Path("half"))[-1]
    ids = mx.array([[1, 2, foreign.vocab_size]])
    assert mx.allclose(load(newest)[0](ids), load("half/final")[0](ids), atol=1e-4)


def test_tokens_for_turns_that_have_learned_nothing_are_trained_beside_adapters(learn, make_model):
    """The vocabulary of many a base has them, without a template that uses them."""
    backend = Tokenizer.of_bytes().backend
    backend.add_special_tokens([START_OF_TURN, END_OF_TURN])
    tokenizer = Tokenizer(backend, backend.token_to_id("<|endoftext|>"))
    save_model(Path("base"), make_model(vocab_size=tokenizer.vocab_size, n_positions=96), tokenizer)
    options = {"init_from": "base", "max_steps": 4, "lora_rank": 4}
    learn("whole", **options)
    learn("half", stop_after=2, **options)
    learn("half", resume="half", **options)
    before, after = (load_file(f"{folder}/model.safetensors")["wte.weight"] for folder in ("base", "whole/final"))
    end = backend.token_to_id(END_OF_TURN)
    assert before.shape == after.shape
    assert not np.allclose(before[end], after[end], atol=1e-3)
    assert Path("half/final/model.safetensors").read_bytes() == Path("whole/final/model.safetensors").read_bytes()


def test_the_validation_loss_is_the_mean_over_the_answers(make_model, talks, learn):
    run = learn("run", max_steps=1)
    model, tokenizer = load("run/final")
    template: Any = ChatTemplate.of(tokenizer)
    lines = [json.loads(line) for line in (talks / "val.jsonl").read_text().splitlines()]
    evaluation = Evaluator(model, PackedWindows(marked(talks, tokenizer), 40), tokenizer.byte_lengths(), batch_size=2)()
    losses, size = [], 0
    for row in lines:
        prompt = template.ids(row["messages"][:1], tokenizer)
        answer = [*tokenizer.encode(row["messages"][1]["content"]), 258]
        logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]
        losses += nn.losses.cross_entropy(logits, mx.array(answer)).tolist()
        size += len(row["messages"][1]["content"])
    assert run.finished
    assert evaluation.tokens == len(losses)
    assert evaluation.text_bytes == size
    assert evaluation.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert evaluation.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-5)


def marked(talks, tokenizer):
    """The tokens of the validation conversations, with their marks."""
    return OBJECTIVES["conversations"].encode(open_corpus(talks), tokenizer, TrainingConfig()).val


def test_a_masked_step_is_that_of_pytorch(make_model, talks, bpe, tmp_path):
    tokenizer = type(bpe)(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(CHATML)
    model = make_model(n_positions=64)
    save_model(tmp_path / "model", model, tokenizer)
    windows, weights = next(PackedWindows(marked(talks, tokenizer), 60).validation(2))
    assert 0 < weights.sum() < weights.size / 2
    objective = device().accelerate(OBJECTIVES["conversations"]())
    (loss, count), gradients = nn.value_and_grad(model, objective)(model, mx.array(windows), mx.array(weights))
    found = {name: gradient / count for name, gradient in tree_flatten(gradients)}

    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    ids, mask = torch.tensor(windows.astype(np.int64)), torch.tensor(weights) > 0
    logits = theirs(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits[mask], ids[:, 1:][mask])
    expected.backward()
    assert count.item() == mask.sum().item()
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)
    parameters = dict(theirs.transformer.named_parameters())
    assert found.keys() == parameters.keys()
    for name, gradient in found.items():
        theirs_too = parameters[name].grad.numpy()
        turned = theirs_too.T if np.array(gradient).shape != theirs_too.shape or "c_" in name else theirs_too
        np.testing.assert_allclose(np.array(gradient), turned if gradient.ndim == 2 else theirs_too, atol=2e-5)


def test_a_model_that_expects_a_token_before_each_text_gets_it_before_conversations(learn, train, talks):
    """Llama and Gemma, for example, write poorly without it."""
    train("base", max_steps=1, n_positions=96)
    path = Path("base/final/tokenizer.json")
    backend = HFTokenizer.from_file(str(path))
    start = backend.token_to_id("<|endoftext|>")
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)])
    backend.save(str(path))
    learn("run", init_from="base/final", max_steps=1)
    tokenizer = load("run/final")[1]
    template: Any = ChatTemplate.of(tokenizer)
    assert template.ids(ask("duck"), tokenizer)[:2] == [start, tokenizer.backend.token_to_id(START_OF_TURN)]
    theirs: Any = transformers.AutoTokenizer.from_pretrained("run/final")
    assert theirs.apply_chat_template(ask("duck"), tokenize=False).startswith("<|endoftext|><|im_start|>user")
    assert marked(talks, tokenizer)[0] & ID == start


def test_too_short_windows_are_refused_with_a_length_that_works(learn):
    sentence = refusal(lambda: learn("run", seq_len=8, max_steps=1))
    assert "too short for the first answer of any of the 27 training conversations: use --seq-len " in sentence
    needed = int(sentence.split("--seq-len ")[1].split()[0])
    assert learn("run", seq_len=needed, max_steps=1).finished
