"""A prompt is continued with the tokens that the model gives, in whole characters, up to the right place."""

import dataclasses
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers

from mlx_gpt import device
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Continuation, Request
from mlx_gpt.generation.stop_strings import Piece, StreamedText, Token
from mlx_gpt.generation.stream import Stats, stream
from mlx_gpt.models.directory import save_model
from mlx_gpt.models.gpt2 import ModelArgs

GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
PROMPT = "The duck swims"


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Caches grow often."""
    monkeypatch.setattr("mlx_gpt.generation.cache.FEWEST", 4)


def texts(model, tokenizer, prompt, **settings):
    """The text of each sample."""
    config = GenerationConfig(**settings)
    made = [""] * config.num_samples
    for piece in stream(model, tokenizer, prompt, config):
        made[piece.sample] += piece.text
    return made


def tokens(model, tokenizer, prompt, **settings):
    """The ids of a text that goes on after its end."""
    engine = Engine(model, tokenizer)
    engine.add(Request(prompt, GenerationConfig(**settings), ends=False))
    return [token.id for _, piece in run(engine) for token in piece.tokens]


def run(engine):
    """Step until nothing is left to do, and return all pieces."""
    told = []
    while engine.busy:
        told += engine.step()
    return told


class Script(nn.Module):
    """Stands in for a model: says the given ids one after the other, whatever it reads."""

    def __init__(self, tokenizer, ids):
        super().__init__()
        self.args = ModelArgs(tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=1, n_positions=1000)
        self.layers = [nn.Module()]
        self._ids = mx.array([*ids, *[tokenizer.end_of_text] * 100])

    def hidden(self, ids_bt, cache):
        first = cache[0].offset
        cache[0].update_and_fetch(*[mx.zeros((*ids_bt.shape[:1], 1, ids_bt.shape[1], 1))] * 2)
        said = self._ids[first : first + ids_bt.shape[1]]
        return (said[:, None] == mx.arange(self.args.vocab_size))[None].astype(mx.float32)

    def head(self, x_btv):
        return x_btv


def test_penalties_let_an_answer_end(byte_tokenizer):
    end = byte_tokenizer.backend.token_to_id("<|im_end|>")
    model: Any = Script(byte_tokenizer, [*b"abc", end])
    engine = Engine(model, byte_tokenizer)
    config = GenerationConfig(
        temperature=0, max_tokens=9, repetition_penalty=2.0, presence_penalty=2.0, frequency_penalty=2.0
    )
    engine.add(Request([end, end], config))
    pieces = [piece for _, piece in run(engine)]
    assert "".join(piece.text for piece in pieces) == "bc"
    assert pieces[-1].reason == "end"


def test_penalties_count_ends_that_end_nothing(byte_tokenizer):
    end = byte_tokenizer.backend.token_to_id("<|im_end|>")
    model: Any = Script(byte_tokenizer, [*b"abc", end])
    said = tokens(model, byte_tokenizer, [end, end], max_tokens=3, presence_penalty=2.0, **GREEDY)
    assert said[:2] == list(b"bc")
    assert said[2] != end


def test_tokens_are_counted_in_a_type_that_a_gpu_can_scatter(byte_tokenizer):
    """Neither Metal nor CUDA scatters 64-bit integers, which is NumPy's type for counts."""
    text = Continuation(Request([1], GenerationConfig()), 0, 0, byte_tokenizer, byte_tokenizer.vocab_size)
    assert text.counts_v is not None
    assert text.counts_v.dtype == mx.int32


@pytest.fixture
def say(byte_tokenizer):
    """The pieces of a text that a model says byte by byte after a prompt of one."""

    def say(text, **settings):
        ids = text if isinstance(text, list) else list(text.encode())
        model: Any = Script(byte_tokenizer, ids)
        return list(stream(model, byte_tokenizer, ">", GenerationConfig(**GREEDY | settings)))

    return say


# ---- the tokens -----------------------------------------------------------------------------------------------------


def without_cache(model, ids, count):
    """The likeliest tokens, the whole text read anew for each; past the last position, its second half."""
    positions, ids, start = model.args.n_positions, list(ids), 0
    for _ in range(count):
        if len(ids) - start > positions:
            start = len(ids) - positions // 2
        ids.append(int(np.array(model(mx.array([ids[start:]])))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("length", [1, 9, 31, 32])
def test_the_cache_changes_no_token_even_past_the_last_position(model, bpe, ids, length):
    prompt = ids.ravel()[:length].tolist()
    assert tokens(model, bpe, prompt, max_tokens=60, **GREEDY) == without_cache(model, prompt, 60)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers_greedy(model, bpe, tmp_path, penalty):
    save_model(tmp_path, model, bpe)
    theirs: Any = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    prompt = bpe.encode(PROMPT)
    options = {"max_new_tokens": 20, "do_sample": False, "repetition_penalty": penalty, "eos_token_id": None}
    expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    ours = tokens(model, bpe, prompt, max_tokens=20, temperature=0, repetition_penalty=penalty)
    assert ours == expected[0, len(prompt) :].tolist()
    assert len(set(ours)) > 3  # a model that says but one thing would show nothing


def test_entries_that_the_tokenizer_lacks_are_never_made(make_model, bpe):
    padded = make_model(vocab_size=bpe.vocab_size + 100)
    made = tokens(padded, bpe, bpe.encode(PROMPT), max_tokens=100, temperature=5.0, top_k=0, top_p=1.0, seed=0)
    assert max(made) < bpe.vocab_size


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_and_another_another(model, bpe):
    once, again, other, never, nor = (
        texts(model, bpe, PROMPT, max_tokens=20, seed=seed) for seed in (5, 5, 6, None, None)
    )
    assert once == again
    assert len({*once, *other, *never, *nor}) == 4


def test_samples_are_what_each_is_alone(model, bpe):
    together = texts(model, bpe, PROMPT, max_tokens=40, seed=5, num_samples=2)  # 40 go past the last position
    alone = [texts(model, bpe, PROMPT, max_tokens=40, seed=seed)[0] for seed in (5, 6)]
    assert together == alone


def test_samples_are_the_same_in_any_grouping(model, bpe, monkeypatch):
    settings = {"max_tokens": 6, "seed": 5, "num_samples": 5}
    together = texts(model, bpe, PROMPT, **settings)
    assert len(set(together)) == 5
    monkeypatch.setattr("mlx_gpt.generation.stream.MOST_AT_ONCE", 2)
    assert texts(model, bpe, PROMPT, **settings) == together
    without_seed = texts(model, bpe, PROMPT, max_tokens=6, num_samples=4)
    assert len(set(without_seed)) == 4  # the second group does not repeat the first


def test_memory_does_not_grow_with_the_number_of_samples(model, bpe, monkeypatch):
    def peak(count):
        stats = Stats()
        next(stream(model, bpe, PROMPT, GenerationConfig(max_tokens=2, num_samples=count), stats))
        return stats.peak_memory

    assert peak(5_000) < 1.5 * peak(64)
    here = dataclasses.replace(device.device(), usable=mx.get_active_memory())
    monkeypatch.setattr("mlx_gpt.generation.stream.device", lambda: here)
    assert peak(64) < 0.5 * peak(1) * 64  # one at a time, if no memory is free


def test_texts_of_one_token_leave_nothing_behind(model, bpe):
    engine, prompt = Engine(model, bpe), bpe.encode(PROMPT)

    def memory_after_one_more():
        engine.add(Request(prompt, GenerationConfig(max_tokens=1)))
        assert len(run(engine)) == 1
        return mx.get_active_memory()

    first = memory_after_one_more()
    assert max(memory_after_one_more() for _ in range(20)) <= first


def test_one_sample_may_end_before_the_other(model, bpe):
    whole = texts(model, bpe, PROMPT, max_tokens=20, seed=5, num_samples=2)
    stop = whole[0][10:14]
    assert stop not in whole[1]
    made = texts(model, bpe, PROMPT, max_tokens=20, seed=5, num_samples=2, stop=(stop,))
    assert made == [whole[0][: whole[0].index(stop)], whole[1]]


# ---- the text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_the_text_is_that_of_the_tokens(make_model, byte_tokenizer, bpe, name):
    tokenizer = {"bytes": byte_tokenizer, "bpe": bpe}[name]
    model = make_model(vocab_size=tokenizer.vocab_size)
    settings = {"max_tokens": 50, "seed": 5}
    made = list(
        takewhile(lambda i: i not in tokenizer.ends, tokens(model, tokenizer, tokenizer.encode(PROMPT), **settings))
    )
    assert len(made) > 5
    assert texts(model, tokenizer, PROMPT, **settings) == [tokenizer.decode(made)]


def test_characters_come_whole_and_at_once(say):
    assert [piece.text for piece in say("aé🦆b")] == ["a", "é", "🦆", "b", ""]


def test_a_character_that_is_cut_off_shows_as_such_at_the_end_only(say):
    assert [piece.text for piece in say("a🦆", max_tokens=4)] == ["a", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "settings", "made", "reason"),
    [
        ("abcdef", {"max_tokens": 4}, "abcd", "length"),
        ("abcdef", {"max_tokens": 1}, "a", "length"),
        ("abcdef", {}, "abcdef", "end"),
        ("", {}, "", "end"),
        ("abcdef", {"stop": ("cde",)}, "ab", "stop"),  # over three tokens
        ("abcdef", {"stop": ("zz", "ef", "cd")}, "ab", "stop"),  # the first to come
        ("abcdef", {"stop": ("de", "bcde")}, "a", "stop"),  # the longest where two come at once
        ("ababac", {"stop": ("abac",)}, "ab", "stop"),  # which seemed to begin before
        ("a🦆é!", {"stop": ("🦆é",)}, "a", "stop"),
        ("abc", {"stop": ("abc",)}, "", "stop"),
        ("abcdef", {"stop": ("efg",)}, "abcdef", "end"),  # what was held back comes after all
        ("abcdef", {"stop": ("efg",), "max_tokens": 6}, "abcdef", "length"),
        ("abcdef", {"stop": ("def",), "max_tokens": 6}, "abc", "stop"),
    ],
)
def test_a_text_ends_where_it_should_and_says_why(say, text, settings, made, reason):
    pieces = say(text, **settings)
    assert "".join(piece.text for piece in pieces) == made
    assert [piece.reason for piece in pieces] == [""] * (len(pieces) - 1) + [reason]


def test_only_what_may_begin_a_stop_string_is_held_back(say):
    pieces = say("xaay", stop=("ab",))
    assert [piece.text for piece in pieces] == ["x", "a", "ay", ""]


@pytest.mark.parametrize("end", [256, 258], ids=["of text", "of a turn"])
def test_an_end_ends_even_amid_the_vocabulary(say, end):
    pieces = say([*b"ab", end, *b"cd"])
    assert "".join(piece.text for piece in pieces) == "ab"
    assert pieces[-1].reason == "end"


def test_stop_strings_end_a_real_text_wherever_they_lie(model, bpe):
    whole = texts(model, bpe, PROMPT, max_tokens=20, seed=5)[0]
    for at in range(0, len(whole) - 3, 5):
        stop = whole[at : at + 3]
        assert texts(model, bpe, PROMPT, max_tokens=20, seed=5, stop=(stop,)) == [whole[: whole.index(stop)]]


# ---- around it ------------------------------------------------------------------------------------------------------


def test_stats_count_what_was_read_and_made(model, bpe):
    stats = Stats()
    config = GenerationConfig(max_tokens=7, num_samples=3, seed=0)
    for _ in stream(model, bpe, PROMPT, config, stats):
        pass
    assert stats.prompt_tokens == len(bpe.encode(PROMPT))
    assert stats.new_tokens == 21
    assert stats.seconds > 0
    assert stats.prompt_seconds > 0
    assert stats.peak_memory > 0
    assert "21 tokens" in str(stats)


def test_dropout_is_off(make_model, model, bpe):
    dropping = make_model(dropout=0.5)
    assert texts(dropping, bpe, PROMPT, max_tokens=10, **GREEDY) == texts(model, bpe, PROMPT, max_tokens=10, **GREEDY)


def test_an_empty_prompt_is_refused(model, bpe):
    with pytest.raises(UserError, match="prompt is empty"):
        texts(model, bpe, "")


def test_a_prompt_may_fill_the_context_but_no_more(make_model, byte_tokenizer):
    model = make_model(vocab_size=259)
    assert texts(model, byte_tokenizer, "x" * 32, max_tokens=9, **GREEDY)[0]
    with pytest.raises(UserError, match="33 tokens, more than the model's context of 32"):
        texts(model, byte_tokenizer, "x" * 33)


# ---- in company -----------------------------------------------------------------------------------------------------


def alone(model, tokenizer, request, max_batch=1):
    engine = Engine(model, tokenizer, max_batch)
    engine.add(request)
    return made(run(engine))


def made(told):
    """By request and sample: the text, its tokens and its reason."""
    texts: dict[Any, list[Any]] = {}
    for request, piece in told:
        found = texts.setdefault((request, piece.sample), ["", [], ""])
        found[0] += piece.text
        found[1] += [token.id for token in piece.tokens]
        found[2] = piece.reason
    return texts


def various_requests(bpe, count=24):
    """Greedy and drawn, short and long, with every setting, some past the last position."""
    kinds: list[dict[str, Any]] = [
        GREEDY,
        {"seed": 3},
        {"seed": 4, "temperature": 1.3, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0},
        {"seed": 5, "num_samples": 2, "min_p": 0.02},
        {"seed": 6, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    ]
    ids = bpe.encode("The duck swims over the wide lake and dives for a while, then it comes up again, with a fish.")
    for i in range(count):
        config = GenerationConfig(max_tokens=(7, 1, 40, 23, 12, 30, 3)[i % 7], **kinds[i % 5])
        yield Request(
            ids[i % 9 : i % 9 + 1 + 5 * (i % 4)], config, logit_bias={7: -100.0, 9: 2.0} if i % 6 == 0 else {}
        )


def test_a_text_is_the_same_alone_and_in_company(model, bpe):
    requests = list(various_requests(bpe))
    engine = Engine(model, bpe, max_batch=4)
    told = []
    for i, request in enumerate(requests):  # they come while others are being decoded
        engine.add(request)
        for _ in range(i % 3):
            told += engine.step()
            assert engine.active <= 4
    together = made(told + run(engine))
    expected: dict[Any, list[Any]] = {}
    for request in requests:
        expected |= alone(model, bpe, request, request.config.num_samples)
    assert together == expected
    assert len(together) == sum(request.config.num_samples for request in requests)
    assert {reason for *_, reason in together.values()} >= {"length"}


def test_a_long_prompt_stalls_nobody(make_model, bpe, monkeypatch):
    monkeypatch.setattr("mlx_gpt.device.CHUNK_CPU", 4)
    model, ids = make_model(), bpe.encode(PROMPT)
    first = Request(ids[:2], GenerationConfig(max_tokens=28, **GREEDY), ends=False)
    long = Request([*ids, *ids, *ids][:31], GenerationConfig(max_tokens=2, **GREEDY), ends=False)
    engine = Engine(model, bpe, max_batch=2)
    engine.add(first)
    for _ in range(3):
        engine.step()
    engine.add(long)
    order = [request for request, piece in run(engine) for _ in piece.tokens]
    assert order.index(long) >= 7  # its prompt takes eight steps, each of which has a token for the other
    chunks = made(run_all(model, bpe, [long]))
    monkeypatch.undo()
    assert [*made(run_all(model, bpe, [long])).values()] == [*chunks.values()]


def run_all(model, tokenizer, requests, max_batch=4):
    engine = Engine(model, tokenizer, max_batch)
    for request in requests:
        engine.add(request)
    return run(engine)


def test_a_request_that_is_dropped_frees_its_place_wherever_it_is(model, bpe):
    ids = bpe.encode(PROMPT)

    def request(**settings):
        return Request(ids, GenerationConfig(max_tokens=35, **GREEDY | settings), ends=False)

    expected = [*alone(model, bpe, request()).values()]
    for steps in range(40):  # queued, being read, its first token on the way, decoded, its context full, read again
        engine, gone, waits = Engine(model, bpe, max_batch=2), request(num_samples=2, seed=1), request()
        engine.add(gone)
        engine.add(waits)
        told = [one for _ in range(steps) for one in engine.step() if one[0] is waits]
        engine.drop(gone)
        told += run(engine)
        assert {asked for asked, _ in told} == {waits}
        assert [*made(told).values()] == expected
        assert (engine.active, engine.waiting) == (0, 0)


def test_more_samples_than_places_are_refused(model, bpe):
    with pytest.raises(UserError, match="3 texts were asked for, but at most 2"):
        Engine(model, bpe, max_batch=2).add(Request([1], GenerationConfig(num_samples=3)))


# ---- what a model thinks of tokens ----------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own(model, bpe):
    ids = bpe.encode(PROMPT)
    config = GenerationConfig(max_tokens=12, seed=3, temperature=2.0)
    told = [
        token
        for _, piece in run_all(model, bpe, [Request(ids, config, {}, 3, True, ends=False)])
        for token in piece.tokens
    ]
    tokens = [token.id for token in told]
    assert tokens[: len(ids)] == ids
    assert len(tokens) == len(ids) + 12
    logits = np.array(model(mx.array([tokens])))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert told[0].logprob is None
    for before, token in zip(expected, told[1:], strict=False):
        assert token.logprob == pytest.approx(before[token.id], abs=1e-4)
        assert [i for i, _ in token.alternatives] == np.argsort(-before)[:3].tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(np.sort(before)[::-1][:3], abs=1e-4)
    assert "".join(token.text for token in told) == bpe.decode(tokens)


def test_entries_that_the_tokenizer_lacks_have_no_probability(make_model, bpe):
    padded = make_model(vocab_size=bpe.vocab_size + 100)
    asked = Request(bpe.encode(PROMPT), GenerationConfig(max_tokens=2, seed=1), alternatives=300, prompt_too=True)
    for _, piece in run_all(padded, bpe, [asked]):
        for token in piece.tokens:
            if token.logprob is not None:
                assert sum(np.exp(logprob) for _, logprob in token.alternatives) == pytest.approx(1, abs=1e-4)
                assert max(i for i, _ in token.alternatives) < bpe.vocab_size


def test_bias_makes_a_token_certain_or_impossible(model, bpe):
    ids, config = bpe.encode(PROMPT), GenerationConfig(max_tokens=5, **GREEDY)
    usual = alone(model, bpe, Request(ids, config, ends=False))
    [[_, tokens, _]] = usual.values()
    [[_, biased, _]] = alone(model, bpe, Request(ids, config, {11: 100.0}, ends=False)).values()
    [[_, banned, _]] = alone(model, bpe, Request(ids, config, dict.fromkeys(tokens, -100.0), ends=False)).values()
    assert biased == [11] * 5
    assert not {*banned} & {*tokens}


@pytest.mark.parametrize(
    ("stop", "made"),
    [((), list("abcdef")), (("cd",), list("ab")), (("zz", "de"), list("abc")), (("f",), list("abcde"))],
)
def test_the_tokens_told_are_those_of_the_text(say, stop, made):
    pieces = say("abcdef", stop=stop)
    assert [token.text for piece in pieces for token in piece.tokens] == made
    for piece in pieces:
        assert "".join(token.text for token in piece.tokens) == piece.text


def test_a_token_that_a_stop_string_cuts_is_told_whole(byte_tokenizer):
    text = StreamedText(0, byte_tokenizer, [], ["b"])
    text._detokenizer = Words()  # type: ignore[assignment]
    assert [*text.add(0, "")] == [Piece(0, "xy", tokens=(Token(0, "xy"),))]
    assert [*text.add(1, "")] == [Piece(0, "a", "stop", (Token(1, "abc"),))]


class Words:
    """Stands in for a detokenizer with long tokens."""

    def add(self, token):
        return ["xy", "abc"][token]


@pytest.mark.parametrize("length", [5, 40])
def test_an_engine_continues_from_what_another_has_read(model, bpe, length):
    """The second text is the same whether its beginning is read again or not, even after the context was full."""
    first, second = bpe.encode(PROMPT), bpe.encode(f"{PROMPT} in the pond")
    config = GenerationConfig(**GREEDY, max_tokens=length)
    engine = Engine(model, bpe)
    engine.add(Request(first, config, ends=False))
    made = [token.id for _, piece in run(engine) for token in piece.tokens]
    for prompt in (second, [*first, *made][:30], first):
        later = Engine(model, bpe, past=engine.past)
        later.add(Request(prompt, config, ends=False))
        assert [token.id for _, piece in run(later) for token in piece.tokens] == tokens(
            model, bpe, prompt, **GREEDY, max_tokens=length
        )
