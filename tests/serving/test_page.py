"""The page in a real browser."""

import copy
import re
import shutil

import pytest
from conftest import TEMPLATE, serving

pytest.importorskip("playwright", reason="needs playwright, see the extra `dev`")
from playwright.sync_api import expect, sync_playwright

GENERATE = re.compile("^Generate")  # and not "Regenerate"
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package `chromium`)")
# Nothing but the page: no look-ups of its own on a machine without a network.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page whose console must stay empty."""
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.close()
    assert said == []


@pytest.fixture(scope="module")
def server(calm, baseline, tokenizer):
    with serving([("calm", (calm, tokenizer)), ("baseline", (baseline, tokenizer))]) as (address, services):
        for service in services:
            service.engine.runner.end_ids = set()
        yield address, services


def settings(page, **values):
    page.locator("#settings").evaluate("e => { e.open = true }")
    for label, value in values.items():
        page.get_by_label(label.replace("_", " ").capitalize()).fill(value)


def test_text_appears_in_patches_beside_the_baselines(page, server):
    page.goto(server[0])
    expect(page.locator("#about")).to_have_text(
        "calm: 3 tokens per step, context of 399 tokens; baseline: 1 token per step, context of 256 tokens"
    )
    expect(page.locator("#mode")).to_be_hidden()
    page.get_by_label("Prompt", exact=True).fill("the <b>quick</b>")
    page.get_by_role("button", name="Balanced").click()
    settings(page, length="30", candidates="16", seed="1")
    page.get_by_role("button", name=GENERATE).click()
    ours, other = page.locator("section").nth(0), page.locator("section").nth(1)
    expect(ours.locator(".numbers")).to_contain_text("30 tokens in 10 steps (20 fewer than a token model)")
    expect(other.locator(".numbers")).to_contain_text("30 tokens in 30 steps;")
    expect(ours.locator(".patch")).to_have_count(10)
    expect(ours.locator(".prompt")).to_have_text("the <b>quick</b>")
    first = ours.locator(".text").inner_text()
    ours.locator(".patch").nth(3).dispatch_event("mouseover")
    expect(ours.locator(".details")).to_contain_text("candidates sampled")
    expect(ours.locator(".details")).to_contain_text("agreement: 2 equal candidates required")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
    expect(ours.locator(".numbers")).to_contain_text("30 tokens")
    expect(page.locator(".turn")).to_have_count(1)
    assert ours.locator(".text").inner_text() == first  # the same seed


def test_the_chart_shows_the_speed_of_every_model(page, server):
    page.goto(server[0])
    settings(page, length="12")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.locator(".speed polyline")).to_have_count(2)
    expect(page.locator(".speed svg")).to_have_attribute("aria-label", re.compile(r"calm: \d+ tokens/s; baseline: \d+"))
    expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
    # The last point of a line is at the bottom of the axis for 0 tokens, and at the top for the most tokens.
    points = page.locator(".speed polyline").first.get_attribute("points").split()
    assert points[0].startswith("44.0,136.0")
    assert points[-1].endswith(",10.0")


def test_a_prompt_can_be_edited_and_every_text_copied(browser, server):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(server[0])
    page.get_by_role("button", name="Once upon a time").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Once upon a time")
    settings(page, length="6")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.locator(".patch")).to_have_count(2 + 6 + 2)  # of both models, and of the legend
    page.get_by_role("button", name="Copy the text of calm").click()
    expect(page.get_by_role("button", name="Copy the text of calm")).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("Once upon a time")
    assert copied == page.locator("section .text").first.evaluate("e => e.textContent")
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_role("button", name="Edit").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Once upon a time")
    context.close()


def test_styles_set_the_lowest_temperature_that_the_sampler_allows(page, server):
    page.goto(server[0])
    settings(page)
    shown = page.locator("#temperature-shown")
    page.get_by_role("button", name="Precise").click()
    expect(shown).to_have_text("0.30")
    page.get_by_label("Sampler").select_option(label="multi-token prediction")
    page.get_by_role("button", name="Precise").click()
    expect(shown).to_have_text("0 (greedy)")
    expect(page.get_by_role("button", name="Precise")).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Length, tokens").fill("6")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.locator("section .numbers").first).to_contain_text("6 tokens in 2 steps")
    page.get_by_label("Sampler").select_option("batch")
    expect(shown).to_have_text("0.30")


def test_everything_can_be_done_with_the_keyboard(page, server):
    page.goto(server[0])
    settings(page, length="12")
    page.get_by_label("Prompt", exact=True).fill("a")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    section = page.locator("section").first
    expect(section.locator(".patch")).to_have_count(4)
    section.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(section.locator(".patch").nth(1)).to_have_class("patch current")
    expect(section.locator(".details")).to_contain_text("3 tokens in")
    for control in page.locator("input:visible, select:visible, textarea, button").all():
        assert control.evaluate("e => (e.labels && e.labels.length) || e.textContent.trim()"), control


def test_stop_ends_the_text_and_frees_the_slot(page, server):
    address, services = server
    page.goto(address)
    settings(page, length="250")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.locator("section .patch").nth(2)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    for _ in range(200):
        if not any(service.engine.num_running for service in services):
            break
        page.wait_for_timeout(10)
    assert not any(service.engine.num_running for service in services)


def test_an_error_is_shown(browser, server):
    page = browser.new_page()
    page.goto(server[0])
    expect(page.locator("#sampler option").first).to_be_attached()
    page.locator("#temperature").evaluate("e => { e.value = 0 }")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.get_by_role("alert")).to_contain_text("temperature must be in (0, 1]")
    page.close()


def test_a_chat_has_a_history_and_a_key_is_asked_for_where_one_is_needed(browser, calm, tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    with serving([("chat", (calm, chatting))], api_keys=["secret"]) as (address, services):
        services[0].engine.runner.end_ids = set()
        page, sent = browser.new_page(), []
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("This server requires an API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name=GENERATE).click()
        expect(page.locator("section .patch").first).to_be_attached()
        expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
        page.get_by_role("radio", name="Chat").check()
        settings(page, length="6")
        answers = page.locator("section .text")
        for count, message in enumerate(["hello", "again"], start=2):
            page.get_by_label("Prompt", exact=True).fill(message)
            page.get_by_role("button", name=GENERATE).click()
            expect(answers).to_have_count(count)
            expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
            expect(page.locator("section .numbers").last).to_contain_text("6 tokens in 2 steps")
        assert [message["role"] for message in sent[-1]["messages"]] == ["user", "assistant", "user"]
        assert sent[-1]["messages"][1]["content"] == answers.nth(1).evaluate("e => e.textContent")
        page.get_by_role("button", name="Regenerate").nth(1).click()  # the first message: the second is gone
        expect(answers).to_have_count(2)
        expect(page.get_by_role("button", name=GENERATE)).to_be_enabled()
        page.get_by_role("button", name="Clear").click()
        expect(page.locator(".turn")).to_have_count(0)
        page.close()


def test_the_page_fits_a_telephone_and_the_dark(browser, server):
    context = browser.new_context(viewport={"width": 380, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(server[0])
    settings(page, length="30")
    page.get_by_role("button", name=GENERATE).click()
    expect(page.locator("section .numbers").last).to_contain_text("30 tokens")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    context.close()
