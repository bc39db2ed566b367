"""A person converses with a model on the page, in a real Chromium."""

import json
import re

import pytest
from playwright.sync_api import expect

from mlx_gpt.models.directory import save_model
from mlx_gpt.tokenizer import Tokenizer
from tests.serving.conftest import served
from tests.serving.test_page import chromium, contrast  # noqa: F401 - a fixture

CHATML = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('not this word') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = ".turn.assistant .text"


@pytest.fixture(scope="module")
def duck(make_model, sentences, tmp_path_factory):
    """A model with a chat template."""
    folder = tmp_path_factory.mktemp("conversing") / "duck"
    save_model(folder, make_model(vocab_size=300, n_positions=4096), Tokenizer.train(sentences, 300))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def address(folders, duck):
    with served(folders / "plain", duck, duck, max_tokens=10**6) as url:
        yield url


@pytest.fixture
def context(chromium, address):  # noqa: F811
    """Errors in the page's console fail the test, except for refusals by the server."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, permissions=["clipboard-read"])
    errors: list[str] = []
    context.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []


@pytest.fixture
def page(context, address):
    page = context.new_page()
    page.goto(address)
    page.get_by_text("Conversation", exact=True).click()
    page.get_by_label("Seed").fill("7")  # the same answer each time
    page.get_by_role("spinbutton", name="Length").fill("8")
    return page


def rest(page):
    """Wait until nothing is being written."""
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=30_000)


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    rest(page)


def press(page, name, nth=-1):
    page.get_by_role("button", name=name, exact=True).nth(nth).click()
    rest(page)


def turns(page):
    return page.locator(".turn .text").all_text_contents()


def asked(page, action):
    """The messages that the page sends after an action. If the last one is the assistant's, it is to be continued."""
    with page.expect_request("**/v1/chat/completions") as request:
        action()
    body = request.value.post_data_json
    assert ("continue_final_message" in body) == (body["messages"][-1]["role"] == "assistant")
    return body["messages"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_each_view_has_its_own_penalty(page):
    penalty = page.get_by_role("spinbutton", name="Repetition penalty")
    assert penalty.input_value() == "1"  # an answer may repeat the words of the question
    page.get_by_text("Sheet", exact=True).click()
    assert penalty.input_value() == "1.1"
    penalty.fill("1.5")
    page.get_by_text("Conversation", exact=True).click()
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, "Hello")
    assert request.value.post_data_json["repetition_penalty"] == 1
    page.get_by_text("Sheet", exact=True).click()
    assert penalty.input_value() == "1.5"


def test_a_person_asks_and_the_model_answers(page, address):
    expect(page.get_by_label("Model")).to_have_value("duck")
    assert page.locator("option:disabled").all_text_contents() == ["plain"]  # it has no chat template
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("Where do")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("ducks swim?")
    question = user("Where do\nducks swim?")
    assert asked(page, lambda: page.keyboard.press("Enter")) == [question]
    rest(page)
    body = {"model": "duck", "messages": [question], "seed": 7, "max_tokens": 8}
    body |= {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0, "repetition_penalty": 1}
    choice = page.request.post(f"{address}/v1/chat/completions", data=body | {"logprobs": True}).json()["choices"][0]
    expected, tokens = choice["message"]["content"], [token["token"] for token in choice["logprobs"]["content"]]
    assert turns(page) == ["Where do\nducks swim?", expected]
    assert page.locator(f"{ANSWER} .made").count() >= 5
    made = page.locator(f"{ANSWER} .made").all_text_contents()
    assert "".join(made) == expected
    assert any(token.startswith("bytes:") for token in tokens)  # part of a character, which ends in a later token
    ends = iter(made)
    assert all(any(text.endswith(token) for text in ends) for token in tokens if not token.startswith("bytes:"))
    page.keyboard.type("And geese?")
    assert asked(page, lambda: page.keyboard.press("Enter")) == [question, assistant(expected), user("And geese?")]


def test_a_token_of_an_answer_can_be_replaced(page):
    send(page, "Ducks")
    before = page.locator(ANSWER).text_content()
    page.locator(ANSWER).focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    near, token = page.locator(f"{ANSWER} .near"), page.locator(f"{ANSWER} .made").nth(3)
    assert near.text_content() == token.text_content()
    expect(page.locator(".token .word").first).to_contain_text("%")
    assert re.search(r"\bp\d\b", token.get_attribute("class") or "")
    prefix = "".join(page.locator(f"{ANSWER} .made").all_text_contents()[:3])
    page.keyboard.press("Enter")  # to the alternatives
    other = page.locator(".token li button:focus .word").inner_text().replace("\u21b5", "\n")
    if other == token.text_content():
        page.keyboard.press("Tab")
        other = page.locator(".token li button:focus .word").inner_text().replace("\u21b5", "\n")
    page.keyboard.press("Enter")
    rest(page)
    after = page.locator(ANSWER).text_content()
    assert after.startswith(prefix + other)
    assert len(after) > len(prefix + other)
    page.get_by_role("button", name="Earlier version").click()
    assert page.locator(ANSWER).text_content() == before


def test_a_turn_can_be_edited_and_answered_anew(page):
    send(page, "Ducks")
    send(page, "Geese")
    before = turns(page)
    press(page, "Edit", 0)
    expect(page.get_by_label("Edit your turn")).to_be_focused()
    page.keyboard.type(" and swans")
    assert asked(page, lambda: page.keyboard.press("Enter")) == [user("Ducks and swans")]
    rest(page)
    assert turns(page)[0] == "Ducks and swans"
    assert len(turns(page)) == 2
    expect(page.get_by_label("Version 2 of 2")).to_be_visible()
    page.get_by_role("button", name="Earlier version").click()
    assert turns(page) == before
    press(page, "Edit", 0)
    page.keyboard.type(" nobody wants")
    page.keyboard.press("Escape")
    assert turns(page) == before
    press(page, "Edit", 2)
    page.get_by_role("button", name="Answer anew").click()  # with the same text
    rest(page)
    assert turns(page)[:3] == before[:3]
    expect(page.get_by_label("Version 2 of 2")).to_have_count(1)


def test_an_answer_can_be_edited_and_continued(page):
    send(page, "Ducks")
    send(page, "Geese")
    before = turns(page)
    press(page, "Edit", 1)
    page.get_by_label("Edit the answer").press("Control+Home")
    page.keyboard.type("Well, ")
    page.keyboard.press("Enter")
    assert turns(page) == [before[0], f"Well, {before[1]}", *before[2:]]  # what follows stays
    assert page.locator(ANSWER).first.locator(".made").count() >= 5  # and so do the colours
    press(page, "Edit", 1)
    page.get_by_label("Edit the answer").fill("They swim")
    messages = asked(page, lambda: page.get_by_role("button", name="Save and continue").click())
    assert messages == [user("Ducks"), assistant("They swim")]
    rest(page)
    assert len(turns(page)) == 2
    assert turns(page)[1].startswith("They swim")
    assert len(turns(page)[1]) > len("They swim")


def test_an_empty_answer_is_not_kept_and_the_page_says_so(page):
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    send(page, "Ducks")
    first = turns(page)[1].strip()[0]
    page.get_by_role("button", name="New conversation").click()
    page.get_by_label("Stop at").fill(first)
    send(page, "Ducks")
    assert turns(page) == ["Ducks"]
    expect(page.locator(".status.error")).to_contain_text("The model wrote no answer")
    page.get_by_label("Stop at").fill("")
    press(page, "Answer")
    assert turns(page)[1].strip()[0] == first
    press(page, "Edit", 1)
    page.get_by_label("Edit the answer").fill("")
    page.keyboard.press("Enter")
    assert page.get_by_label("Edit the answer").is_visible()


def test_the_same_answer_again_is_not_another_version(page):
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    send(page, "Ducks")
    press(page, "Again")
    expect(page.locator(".status.error")).to_contain_text("The model gave the same answer again")
    assert page.locator(".versions").count() == 0


def test_the_same_answer_of_another_model_is_kept(page):
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    send(page, "Ducks")
    page.get_by_label("Model", exact=True).select_option("duck-2")
    press(page, "Again")
    expect(page.locator(".versions")).to_contain_text("2/2")


def test_each_further_answer_has_another_seed(page):
    seeds = []

    def note(request):
        if "chat" in request.url:
            seeds.append(request.post_data_json["seed"])

    page.on("request", note)
    page.get_by_label("Stop at").fill("e")  # some answers may be alike, or empty
    send(page, "Ducks")
    for _ in range(3):
        button = "Again" if page.locator(ANSWER).count() else "Answer"
        press(page, button)
    assert seeds == [7, 8, 9, 10]


def test_an_answer_can_be_made_again_and_both_are_kept(page):
    send(page, "Ducks")
    first = turns(page)
    press(page, "Again")  # the seed in the settings stays, but each version adds its number
    second = turns(page)
    assert second != first
    page.get_by_role("button", name="Earlier version").click()
    assert turns(page) == first
    expect(page.get_by_role("button", name="Later version")).to_be_focused()
    page.keyboard.press("Enter")
    assert turns(page) == second


def test_an_answer_that_is_stopped_stays_and_can_be_continued(page):
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data={
        **route.request.post_data_json, "max_tokens": 10**5, "logit_bias": {"0": -100, "1": -100, "2": -100}
    }))  # fmt: skip
    status, tokens = page.locator(".status"), page.locator(f"{ANSWER} .made")
    page.get_by_label("Message", exact=True).fill("Ducks")
    page.keyboard.press("Enter")
    expect(tokens.nth(20)).to_be_attached()
    page.keyboard.press("Escape")
    expect(status).to_have_text(re.compile(r"^\d+ tokens\. Stopped\.$"))
    rest(page)
    stopped, count = page.locator(ANSWER).text_content(), tokens.count()
    page.wait_for_timeout(300)
    assert page.locator(ANSWER).text_content() == stopped
    messages = asked(page, lambda: page.get_by_role("button", name="Continue").click())
    assert messages == [user("Ducks"), assistant(stopped)]
    expect(tokens.nth(count + 5)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    rest(page)
    assert page.locator(ANSWER).text_content().startswith(stopped)


def test_the_conversation_survives_a_reload_and_can_be_put_aside(page):
    page.get_by_text("System message").click()
    page.get_by_label("System message").fill("Be brief.")
    send(page, "Ducks")
    page.get_by_label("Message", exact=True).fill("Not sent yet")
    before, coloured = turns(page), page.locator(f"{ANSWER} .made").count()
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Not sent yet")
    expect(page.get_by_label("System message")).to_have_value("Be brief.")
    assert turns(page) == before
    assert page.locator(f"{ANSWER} .made").count() == coloured
    page.get_by_role("button", name="New conversation").click()
    assert turns(page) == []
    page.get_by_role("button", name="Bring back the last conversation").click()
    assert turns(page) == before


def test_two_tabs_show_the_same_conversation(page, context, address):
    other = context.new_page()
    other.goto(address)
    other.get_by_text("Conversation", exact=True).click()
    other.get_by_label("Message", exact=True).fill("Not sent yet")
    send(page, "Ducks")
    expect(other.locator(ANSWER)).to_have_text(turns(page)[1])
    expect(other.get_by_label("Message", exact=True)).to_have_value("Not sent yet")


def test_two_tabs_lose_no_turn_of_each_other(page, context, address):
    other = context.new_page()
    other.goto(address)
    other.get_by_text("Conversation", exact=True).click()
    send(page, "Ducks")
    press(page, "Edit")  # while it edits, this tab does not follow the other
    other.get_by_role("spinbutton", name="Length").fill("8")
    send(other, "Geese")
    editor = page.get_by_label("Edit the answer")
    editor.fill("Quack.")
    editor.press("Enter")
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    assert turns(page)[:3] == ["Ducks", "Quack.", "Geese"]
    press(page, "Edit")
    other.get_by_role("button", name="New conversation").click()
    send(other, "Swans")
    page.get_by_label("Edit the answer").press("Enter")
    page.reload()
    expect(page.locator(".turn")).to_have_count(4)
    assert turns(page)[:3] == ["Ducks", "Quack.", "Geese"]
    assert "Swans" in page.evaluate("localStorage['mlx-gpt last conversation']")


def test_a_browser_without_room_keeps_the_text_or_says_so(page):
    allow = "limit => Storage.prototype.setItem = function (key, value) {{ if ({}) throw Error(); this[key] = value; }}"
    page.evaluate(allow.format("value.includes('[[')"))  # no room for probabilities
    send(page, "Ducks")
    before = turns(page)
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert turns(page) == before
    assert page.locator(f"{ANSWER} .made").count() == 0
    page.evaluate(allow.format("true"))
    send(page, "Geese")
    expect(page.locator(".status.error")).to_contain_text("no room to keep this conversation")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".status.error")).to_contain_text("press the button again to discard it")
    expect(page.locator(".turn")).to_have_count(4)
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".status.error")).to_have_count(0)


def test_a_conversation_is_copied_and_saved_as_a_row_for_training(page, context):
    page.get_by_text("System message").click()
    page.get_by_label("System message").fill("Be brief.")
    messages = asked(page, lambda: send(page, "Ducks"))
    assert messages == [{"role": "system", "content": "Be brief."}, user("Ducks")]
    expected = {"messages": [*messages, assistant(turns(page)[1])]}
    with page.expect_download() as download:
        page.get_by_role("button", name="Save JSONL").click()
    assert download.value.suggested_filename == "conversation.jsonl"
    assert json.loads(download.value.path().read_text()) == expected
    page.get_by_role("button", name="Copy JSONL").click()
    expect(page.locator(".status")).to_contain_text("Copied the conversation")
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == expected


def test_an_error_is_shown_in_place_and_loses_nothing(page):
    error, answer = page.locator(".status.error"), page.get_by_role("button", name="Answer", exact=True)
    send(page, "refuse")
    expect(error).to_contain_text("not this word")
    assert turns(page) == ["refuse"]
    press(page, "Edit")
    page.get_by_label("Edit your turn").fill("duck " * 5000)
    page.keyboard.press("Enter")
    expect(error).to_contain_text("more than the model's context of 4,096")
    assert turns(page) == ["duck " * 5000]
    press(page, "Edit")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Edit your turn").fill("Ducks")
    page.keyboard.press("Enter")
    expect(error).to_have_text("Cannot reach the server: is it still running?")
    page.unroute_all()
    answer.click()
    rest(page)
    expect(error).to_be_hidden()
    assert (turns(page)[0], len(turns(page))) == ("Ducks", 2)
    first = turns(page)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    press(page, "Again")
    expect(error).to_be_visible()
    assert turns(page) == first
    page.unroute_all()
    chunk = {"choices": [{"delta": {"content": "Half an"}, "finish_reason": None}]}
    stream = f"data: {json.dumps(chunk)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    send(page, "Geese")
    expect(error).to_have_text("The server ended the answer early.")
    assert turns(page) == [*first, "Geese", "Half an"]
    page.unroute_all()
    press(page, "Continue")
    assert turns(page)[-1].startswith("Half an")


def test_the_conversation_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    send(page, "d\N{LATIN SMALL LETTER U WITH DIAERESIS}ck" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(f"{ANSWER} .made").last.click()
    panel = page.locator(".token").bounding_box()
    assert panel["y"] + panel["height"] == 844  # in sight
    assert page.locator(f"{ANSWER} .near").bounding_box()["y"] < panel["y"]
    page.get_by_role("button", name="Close").click()
    expect(page.locator(".token")).to_be_hidden()
    press(page, "Edit", 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.keyboard.press("Escape")
    ink, paper = page.evaluate(
        "(style => [style.color, style.backgroundColor])(getComputedStyle(document.querySelector('.turn.user .text')))"
    )
    assert contrast(ink, paper) > 7


def test_the_length_is_at_most_what_the_server_allows(context, duck):
    with served(duck, max_tokens=5) as url:
        page = context.new_page()
        page.goto(url)
        page.get_by_text("Conversation", exact=True).click()
        expect(page.get_by_role("spinbutton", name="Length")).to_have_value("5")
        page.get_by_label("Seed").fill("7")
        send(page, "Ducks")
        expect(page.locator(".status")).to_contain_text("The answer has reached the length in the settings")
        page.close()


def test_the_sheet_has_the_same_seed(page):
    send(page, "Ducks")
    page.get_by_text("Sheet", exact=True).click()
    expect(page.get_by_label("Seed")).to_have_value("7")
    page.get_by_text("Conversation", exact=True).click()
    assert turns(page)[0] == "Ducks"
