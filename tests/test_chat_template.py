"""Conversations become the same text as in transformers."""

import json
import re

import pytest

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.errors import UserError
from mlx_gpt.models.tokenizer_files import read_tokenizer

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
DEEP = "[" * 100_000
MESSAGES = [{"role": "user", "content": "Are geese <|endoftext|> ducks?"}]


@pytest.fixture
def model_with(tmp_path, bpe):
    """Write a model directory; the template of its tokenizer."""

    def write(config, file=None):
        (tmp_path / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if file:
            (tmp_path / "chat_template.jinja").write_text(file)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text(bpe.to_json())
        return ChatTemplate.of(read_tokenizer(tmp_path))

    return write


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({"chat_template": PLAIN}, None),
        ({"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": PLAIN}]}, None),
        ({"chat_template": "another"}, PLAIN),  # newer versions of transformers write the file
        ({}, PLAIN),
    ],
)
@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_a_template_is_found_wherever_transformers_puts_it(model_with, config, file, token):
    template = model_with(config | {"eos_token": token}, file)
    assert template.text(MESSAGES) == "user: Are geese <|endoftext|> ducks?</s>\n"


@pytest.mark.parametrize(
    "config",
    [{}, {"chat_template": None}, {"chat_template": 7}, {"chat_template": ["x"]}],
)
def test_a_model_may_have_no_template(model_with, config):
    assert model_with(config) is None


@pytest.mark.parametrize("config", ["[]", "[" * 100_000, "no JSON", {"chat_template": PLAIN, "more": "x" * 10**7}])
def test_a_damaged_file_is_not_taken_for_a_model_without_a_template(model_with, config):
    """Fine-tuning would give the model another template, and train its vocabulary."""
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        model_with(config)


@pytest.mark.parametrize("template", ["{% for %}", "{% unknown %}", "{{ " + DEEP], ids=["syntax", "unknown", "deep"])
def test_a_broken_template_is_refused(model_with, template):
    with pytest.raises(UserError, match=r"^The model's chat template can't be used: .*[^.]\.$"):
        model_with({"chat_template": template})


def test_a_tokenizer_config_may_be_large(model_with):
    """Gemma 3's has 1.2 MB."""
    template = model_with({"chat_template": PLAIN, "eos_token": "</s>", "added_tokens_decoder": "x" * 1_500_000})
    assert template.text(MESSAGES) == "user: Are geese <|endoftext|> ducks?</s>\n"


def test_a_file_that_is_not_utf8_is_named(model_with, tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'Gänse' }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"can't be used: .*chat_template.jinja is not UTF-8 text: save it as UTF-8\.$"):
        model_with({})


def test_what_templates_for_transformers_may_use_works(model_with):
    source = "{% generation %}{{ strftime_now('%Y') }} {{ messages[0].role }}{% endgeneration %}!"
    assert re.fullmatch(r"\d{4} user!", model_with({"chat_template": source}).text(MESSAGES))
    source = "{% if tools is none %}{{ {'b': documents, 'a': 'é'} | tojson(indent=1, sort_keys=true) }}{% endif %}"
    assert model_with({"chat_template": source}).text(MESSAGES) == '{\n "a": "é",\n "b": null\n}'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[7].content.upper() }}", "refuses these messages"),
        ("{{ raise_exception('no system message') }}", "^no system message$"),
        (r"{{ raise_exception('\x1b[31mno') }}", r"^'\\x1b\[31mno'$"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages: access to attribute"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses these messages: Range too big"),
    ],
)
def test_a_template_that_fails_is_one_sentence(model_with, source, words):
    with pytest.raises(UserError, match=words):
        model_with({"chat_template": source}).text(MESSAGES)


def test_special_tokens_of_a_template_become_tokens(model_with, bpe):
    template = model_with({"chat_template": "{{ messages[0].content }}{{ eos_token }}", "eos_token": "<|endoftext|>"})
    ids = template.ids([{"role": "user", "content": "The duck"}], bpe)
    assert ids == [*bpe.encode("The duck"), bpe.end_of_text]
    assert bpe.end_of_text not in bpe.encode("The duck<|endoftext|>")  # and still not afterwards
