"""A conversation keeps what was said, and the model sees as much of it as its context holds."""

import contextlib
import itertools

import pytest

from mlx_gpt import api
from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation import engine
from mlx_gpt.generation.dialogue import Dialogue, Exchange
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request

PLAIN = GenerationConfig(max_tokens=12, temperature=0, repetition_penalty=1)


@pytest.fixture(scope="module")
def opened():
    """Open a model directory, once, with its template."""
    known = {}

    def opened(folder):
        if folder not in known:
            model, tokenizer = api.load(folder)
            known[folder] = (model, tokenizer, ChatTemplate.of(tokenizer))
        return known[folder]

    return opened


@pytest.fixture
def dialogue(opened, rambling):
    return Dialogue(*opened(rambling))


@pytest.fixture
def ducks(opened, quacking):
    return Dialogue(*opened(quacking))


@pytest.fixture
def asked(monkeypatch):
    """The prompts that engines get, as text."""
    prompts = []
    add = Engine.add

    def note(self, request):
        prompts.append("".join(self._tokenizer.name_of(token) for token in request.prompt))
        add(self, request)

    monkeypatch.setattr(Engine, "add", note)
    return prompts


def text(pieces):
    return "".join(piece.text for piece in pieces)


def answer(folder, messages):
    """The greedy answer to a whole conversation, read at once."""
    model, tokenizer, template = folder
    alone = Engine(model, tokenizer)
    alone.add(Request(template.ids(messages, tokenizer), PLAIN))
    made = ""
    while alone.busy:
        made += text(piece for _, piece in alone.step())
    return made


def test_each_answer_is_the_one_to_the_whole_conversation(dialogue, opened, rambling):
    dialogue.system = "Swim."
    messages = [{"role": "system", "content": "Swim."}]
    for question in ("The duck", "Geese", "Snails"):
        messages.append({"role": "user", "content": question})
        got = text(dialogue.ask(question, PLAIN))
        assert got == answer(opened(rambling), messages)
        messages.append({"role": "assistant", "content": got})
        assert dialogue.messages == messages


def test_what_was_read_before_is_not_read_again(dialogue, monkeypatch):
    read, hidden = [], engine.models.hidden

    def counting(model, ids_bt, cache):
        read.append(ids_bt.size)
        return hidden(model, ids_bt, cache)

    monkeypatch.setattr(engine.models, "hidden", counting)
    text(dialogue.ask("The duck swims in a pond. " * 3, PLAIN))
    assert read[0] > 100
    read.clear()
    text(dialogue.ask("And?", PLAIN))
    assert read[0] <= 64


def test_the_oldest_exchanges_leave_whole_and_the_system_message_stays(ducks, asked):
    ducks.system = "S"
    for question in "ABCDEF":
        assert text(ducks.ask(question, GenerationConfig())) == "Quack."
        assert ducks.unseen == max(0, len(ducks.exchanges) - 3)
    assert len(ducks.exchanges) == 6
    start = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nD<|im_end|>\n<|im_start|>assistant\nQuack.<|im_end|>\n"
    assert asked[-1].startswith(start)
    assert asked[-1].endswith("<|im_start|>user\nF<|im_end|>\n<|im_start|>assistant\n")
    ducks.undo()
    ducks.clear()
    text(ducks.ask("G", GenerationConfig()))
    assert asked[-1] == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nG<|im_end|>\n<|im_start|>assistant\n"


def test_exchanges_that_left_for_a_message_return_with_it(ducks):
    for question in "ABC":
        text(ducks.ask(question, GenerationConfig()))
    seen = ducks.unseen
    with contextlib.closing(ducks.ask("x" * 30, GenerationConfig())) as pieces:
        assert ducks.unseen > seen  # a person is told before the answer begins
        ducks._model = None  # the first step fails
        with pytest.raises((TypeError, AttributeError)):
            next(pieces)
    assert ducks.unseen == seen


def test_a_message_that_does_not_fit_changes_nothing(ducks):
    text(ducks.ask("A", GenerationConfig()))
    with pytest.raises(UserError, match=r"it has 119 tokens, and the model's context of 128 leaves 96"):
        ducks.ask("x" * 100, GenerationConfig())
    assert text(ducks.ask("x" * 100, GenerationConfig(max_tokens=6))) == "Quack."  # which needs less room
    assert [len(exchange.question) for exchange in ducks.exchanges] == [1, 100]


def test_a_system_message_that_does_not_fit_leaves_the_earlier_one(ducks):
    ducks.system = "S"
    with pytest.raises(UserError, match=r"^The system message is too long: it has 15\d tokens"):
        ducks.system = "x" * 120
    assert ducks.system == "S"


def test_an_answer_ends_where_the_context_does(dialogue, opened, rambling):
    _, tokenizer, template = opened(rambling)
    question = "x" * 160
    pieces = list(dialogue.ask(question, GenerationConfig(max_tokens=1000, repetition_penalty=1, temperature=0)))
    prompt = template.ids([{"role": "user", "content": question}], tokenizer)
    assert pieces[-1].reason == "length"
    assert dialogue.limit == 256 - len(prompt) == sum(len(piece.tokens) for piece in pieces)


def test_the_part_of_an_answer_that_came_is_kept(dialogue):
    whole = text(dialogue.ask("Geese", PLAIN))
    dialogue.undo()
    with contextlib.closing(dialogue.ask("Geese", PLAIN)) as pieces:
        part = text(itertools.islice(pieces, 3))
    assert dialogue.exchanges == [Exchange("Geese", part)]
    assert whole.startswith(part)
    assert len(part) < len(whole)


def test_without_an_answer_the_message_leaves(dialogue):
    text(dialogue.ask("Geese", PLAIN))
    before = dialogue.exchanges
    dialogue.ask("Ducks", PLAIN).close()
    with contextlib.closing(dialogue.again(GenerationConfig())):
        pass
    assert dialogue.exchanges == before


def test_after_ctrl_c_the_next_answer_is_right(dialogue, opened, rambling, monkeypatch):
    text(dialogue.ask("Geese", PLAIN))

    def interrupted(self, logits_bv, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_pick", interrupted)
        with pytest.raises(KeyboardInterrupt):
            text(dialogue.ask("Ducks", PLAIN))
    question = {"role": "user", "content": "Ducks"}
    assert answer(opened(rambling), [*dialogue.messages, question]) == text(dialogue.ask("Ducks", PLAIN))


def test_an_answer_made_again_takes_the_place_of_the_earlier_one(dialogue):
    bold = GenerationConfig(max_tokens=12, temperature=2, seed=1)
    answers = {text(dialogue.ask("Geese", bold)), *(text(dialogue.again(bold)) for _ in range(3))}
    assert len(answers) == 4
    assert len(dialogue.exchanges) == 1
    with pytest.raises(UserError, match="At temperature 0"):
        dialogue.again(PLAIN)


def test_there_may_be_nothing_to_undo_or_to_answer_again(dialogue):
    with pytest.raises(UserError, match="nothing to take back"):
        dialogue.undo()
    with pytest.raises(UserError, match="no answer yet"):
        dialogue.again(GenerationConfig())
