"""A person uses the page in a real Chromium."""

import os
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serving.conftest import served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium fetches nothing but the page, and runs as root, which its sandbox does not allow.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

if not CHROMIUM and "MLX_GPT_TEST_BROWSER" not in os.environ:
    pytest.skip("Chromium is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def address(folders):
    with served(folders / "plain", folders / "chatty", max_tokens=10**6) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """The page. Errors in the console and requests to other hosts fail the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else errors.append(request.url))
    page.goto(address)
    expect(page.locator("textarea")).to_be_focused()
    page.get_by_label("Seed").fill("7")  # the same text each time
    yield page
    context.close()
    assert errors == []


def set_to(page, label, value, sheet=0):
    page.get_by_role("spinbutton", name=label).nth(sheet).fill(str(value))


def continue_texts(page):
    """Have the model continue all texts, and wait until it has."""
    page.locator(".go").first.click()
    expect(page.locator(".go").first).to_be_enabled(timeout=30_000)


def texts(page):
    return [area.input_value() for area in page.locator("textarea").all()]


def endless(page):
    """Have every request ask for a text that never ends."""
    page.route("**/v1/completions", lambda route: route.continue_(post_data={
        **route.request.post_data_json, "max_tokens": 10**6, "logit_bias": {"0": -100, "2": -100}
    }))  # fmt: skip


def test_text_streams_until_it_is_stopped(page):
    page.locator("textarea").fill("The duck")
    endless(page)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".ink .made").nth(20)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator(".status")).to_have_text(re.compile(r"^\d+ tokens\. Stopped\.$"))
    [stopped] = texts(page)
    assert stopped.startswith("The duck")
    page.wait_for_timeout(300)
    assert texts(page) == [stopped]
    assert page.locator(".ink").text_content() == f"{stopped}\u200b"
    page.get_by_role("button", name="Undo").click()
    assert texts(page) == ["The duck"]


def test_the_model_continues_from_the_cursor(page):
    page.locator("textarea").fill("The duck swims in a pond")
    set_to(page, "Length", 4)
    page.locator("textarea").evaluate("area => area.setSelectionRange(8, 8)")
    continue_texts(page)
    [text] = texts(page)
    assert text.startswith("The duck")
    assert not text.startswith("The duck swims in a pond")
    page.get_by_role("button", name="Undo").click()
    assert texts(page) == ["The duck swims in a pond"]


def test_settings_work_and_are_explained(page):
    page.locator("textarea").fill("The duck")
    set_to(page, "Temperature", 0)
    set_to(page, "Length", 6)
    continue_texts(page)
    first = texts(page)
    assert page.locator(".status").inner_text().startswith("6 tokens")
    page.get_by_role("button", name="Undo").click()
    continue_texts(page)
    assert texts(page) == first
    assert page.get_by_role("slider", name="Temperature").input_value() == "0"
    for field in page.get_by_role("spinbutton").all():
        meaning = page.locator(f"#{field.get_attribute('aria-describedby')}")
        assert len(meaning.inner_text()) > 20
    set_to(page, "Temperature", 7)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.locator(".go").click()
    page.wait_for_timeout(300)
    assert (requests, texts(page)) == ([], first)  # the browser refuses the value


def test_a_token_shows_its_probability_and_its_alternatives(page):
    page.locator("textarea").fill("The duck")
    set_to(page, "Length", 8)
    continue_texts(page)
    spans = page.locator(".ink .made")
    token = next(span for span in spans.all() if (span.text_content() or "").strip().isascii())
    token.hover(force=True)
    expect(page.locator(".token .word").first).to_contain_text("%")
    assert re.search(r"\bp\d\b", token.get_attribute("class") or "")
    others = page.locator(".token li")
    assert others.count() == 5
    shares = [float(re.sub(r"[<% ]", "", one.inner_text().split("\n")[-1])) for one in others.all()]
    assert shares == sorted(shares, reverse=True)
    before = texts(page)
    page.locator(".token li button:enabled").last.click()  # half a character cannot be clicked
    expect(page.locator(".go")).to_be_enabled(timeout=30_000)
    assert texts(page) != before
    page.locator("textarea").press("Control+Home")
    page.locator("textarea").press("End")
    page.get_by_role("button", name="Colours").click()
    assert page.locator(".paper.colours").count() == 0


def test_text_held_back_for_a_stop_string_belongs_to_its_token(page):
    page.locator("textarea").fill("The duck")
    set_to(page, "Length", 12)
    continue_texts(page)
    [text], tokens = texts(page), page.locator(".ink .made").all_text_contents()
    page.get_by_role("button", name="Undo").click()
    beginnings = [text[at : at + 3] for at in range(8, len(text) - 3)]
    for stop in {
        f"{beginning}\N{SNOWMAN}" for beginning in beginnings[:: len(beginnings) // 4]
    }:  # none of which the text contains
        page.get_by_label("Stop at").fill(stop)
        page.locator("textarea").fill("The duck")
        continue_texts(page)
        assert texts(page) == [text]
        assert page.locator(".ink .made").all_text_contents() == tokens


def test_typing_into_a_text_keeps_the_tokens_around(page):
    page.locator("textarea").fill("The duck")
    set_to(page, "Length", 8)
    continue_texts(page)
    count = page.locator(".ink .made").count()
    page.locator("textarea").focus()
    page.locator("textarea").evaluate("area => area.setSelectionRange(3, 3)")
    page.keyboard.type(" old")
    assert texts(page)[0].startswith("The old duck")
    assert page.locator(".ink .made").count() == count
    assert page.locator(".ink").text_content() == f"{texts(page)[0]}\u200b"


def test_two_settings_or_models_can_be_compared(page):
    page.locator("textarea").fill("The duck")
    page.get_by_role("button", name="Compare").click()
    for sheet in (0, 1):
        set_to(page, "Temperature", 0, sheet)
        set_to(page, "Length", 6, sheet)
    continue_texts(page)
    one, other = texts(page)
    assert one == other
    page.get_by_label("Model").nth(1).select_option("chatty")
    page.locator("textarea").first.fill("The duck")
    continue_texts(page)
    again, theirs = texts(page)
    assert again == one
    assert theirs != one
    page.get_by_role("button", name="One text").first.click()
    assert texts(page) == [one]


def test_the_loss_curve_is_shown_and_described(page):
    curve = page.get_by_role("img")
    expect(curve).to_have_attribute("aria-label", re.compile("Loss over 20 steps, from 6.00 to 4.00; .* fell to 4.10"))
    assert curve.locator("polyline").count() == 2
    page.get_by_label("Model").select_option("chatty")
    expect(page.locator(".run")).to_be_hidden()


def test_text_is_never_taken_for_html(page):
    page.locator("textarea").fill("<img src=x onerror=x()>")
    set_to(page, "Length", 3)
    continue_texts(page)
    assert page.locator("main img").count() == 0
    assert texts(page)[0].startswith("<img src")
    assert "<img" in (page.locator(".ink").text_content() or "")


def test_a_refusal_is_shown_and_loses_no_text(chromium, address):
    context = chromium.new_context()  # Chromium reports a refusal in the console
    page = context.new_page()
    page.goto(address)
    page.locator("textarea").fill("duck " * 60)
    page.locator(".go").click()
    expect(page.locator(".status.error")).to_contain_text("more than the model's context of 32")
    assert texts(page) == ["duck " * 60]
    context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_the_page_fits_and_is_readable(chromium, address, scheme, width):
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.locator("textarea").fill("The duck")
    continue_texts(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('textarea')).color, "
        "getComputedStyle(document.querySelector('.paper')).backgroundColor]"
    )
    assert contrast(ink, paper) > 7
    # The letters of both layers must lie on each other, or colours would be beside their tokens.
    heights = page.evaluate("['textarea', '.ink'].map(name => document.querySelector(name).scrollHeight)")
    assert abs(heights[0] - heights[1]) <= 2
    context.close()


def contrast(*colours):
    """The contrast of two colours (https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    lighter, darker = sorted(map(luminance, colours), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_page_asks_for_the_key(chromium, folders):
    with served(folders / "plain", api_key="sesame") as url:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(url)
        page.get_by_label("This server needs its API key").fill("sesame")
        page.keyboard.press("Enter")
        expect(page.locator("textarea")).to_be_visible()
        expect(page.get_by_role("radio")).to_have_count(0)  # this model does not converse
        page.get_by_label("Seed").fill("7")  # with another one, the text may end at once
        continue_texts(page)
        assert len(texts(page)[0]) > len("The")
        context.close()
