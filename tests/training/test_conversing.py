"""A model that has read some text learns to converse, and answers questions put in words that it has not seen.

docs/chat.md does the same with `--preset tiny` and all of the questions.
"""

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import mlx_lm
import openai
import pytest
import transformers
from playwright.sync_api import expect

import mlx_gpt
from tests.cli.conftest import PROGRAM
from tests.serving.conftest import served
from tests.serving.test_page import chromium  # noqa: F401 - a fixture

PYTHON = Path(__file__).parents[2] / "docs/python.md"
LIBRARY = runpy.run_path(str(Path(__file__).parents[2] / "docs/library_questions.py"))
FACTS = 5
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128, "vocab_size": 500, "seq_len": 128}
BASE: dict[str, Any] = {
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "max_steps": 200,
    "max_epochs": 999,
}


def conversations(held_out):
    """The questions about the first facts."""
    answers = {answer for _, answer in LIBRARY["FACTS"][:FACTS]}
    return [row for row in LIBRARY["conversations"](held_out) if row[1]["content"] in answers]


UNSEEN = [(question["content"], answer["content"]) for question, answer in conversations(True)]


def share_right(answers):
    """The share of the unseen questions to which these answers are right."""
    return sum(a == right for a, (_, right) in zip(answers, UNSEEN, strict=True)) / len(UNSEEN)


def asked_on_the_command_line(model):
    """The answers to the unseen questions, each at the beginning of a conversation."""
    lines = "\n/new\n".join(question for question, _ in UNSEEN)
    command = [PROGRAM, "generate", "--model", model, "--interactive", "--temperature", "0", "--max-tokens", "60"]
    return subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and the runs that trained all its weights, or adapters."""
    folder = tmp_path_factory.mktemp("library")
    sentences = [f"{text.capitalize()}\n" for names, answer in LIBRARY["FACTS"] for text in (*names, answer)]
    talks = [{"messages": row} for row in conversations(False)]
    for name, rows in (("text", [{"text": text} for text in sentences * 20]), ("talks", talks)):
        (folder / name).mkdir()
        for split, part in (("train", rows), ("val", rows[::9])):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    base = str(folder / "base")
    mlx_gpt.train(data=str(folder / "text"), out=base, **SIZES, **BASE)
    kinds: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 8}}
    for name, kind in kinds.items():
        mlx_gpt.train(data=str(folder / "talks"), init_from=base, out=str(folder / name), max_steps=500, **kind)
    return folder


@pytest.mark.parametrize(("run", "enough"), [("full", 0.9), ("lora", 0.8)])
def test_the_command_line_answers_unseen_questions(runs, run, enough):
    assert share_right(asked_on_the_command_line(runs / run)) >= enough


def test_the_server_and_the_page_answer_them(runs, chromium):  # noqa: F811
    with served(runs / "full") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answers = [
            client.chat.completions.create(
                model="full", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=60
            )
            .choices[0]
            .message.content
            for question, _ in UNSEEN
        ]
        assert share_right(answers) >= 0.9
        page = chromium.new_page()
        page.goto(url)
        page.get_by_text("Conversation", exact=True).click()
        page.get_by_role("spinbutton", name="Temperature").fill("0")
        for (question, _), answer in zip(UNSEEN[::6], answers[::6], strict=True):
            page.get_by_label("Message", exact=True).fill(question)
            page.keyboard.press("Enter")
            expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=30_000)
            assert page.locator(".turn.assistant .text").all_text_contents() == [answer]
            page.get_by_role("button", name="New conversation").click()
        page.close()


def test_other_programs_give_the_same_answers(runs):
    ours = asked_on_the_command_line(runs / "full")
    folder = str(runs / "full/best")
    network = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model, mlx_tokenizer = mlx_lm.load(folder)[:2]
    for (question, _), answer in list(zip(UNSEEN, ours, strict=True))[::12]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        made = network.generate(**prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True) == answer
        ids = mlx_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert mlx_lm.generate(model, mlx_tokenizer, ids, max_tokens=60) == answer


def test_python_counts_the_right_answers_as_docs_chat_shows(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("weights/library").symlink_to(runs / "full")
    Path("unseen.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in conversations(True)))
    page = (Path(__file__).parents[2] / "docs/chat.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(code, "chat.md", "exec"), {})
    [code] = [
        b for b in re.findall(r"^```python\n(.*?)^```", PYTHON.read_text(), re.DOTALL | re.MULTILINE) if "role" in b
    ]
    right = round(share_right(asked_on_the_command_line(runs / "full")) * len(UNSEEN))
    assert capsys.readouterr().out == f"{right} of {len(UNSEEN)} answers are right.\n"
    exec(compile(code, "python.md", "exec"), {"mlx_gpt": mlx_gpt})
    assert capsys.readouterr().out.strip()
