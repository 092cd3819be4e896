"""The page in a real browser."""

import copy
import shutil

import pytest
from conftest import TEMPLATE, serving

pytest.importorskip("playwright", reason="needs playwright, see the extra `dev`")
from playwright.sync_api import expect, sync_playwright

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
            service.engine.stepper.end_ids = set()
        yield address, services


def test_text_appears_in_chunks_beside_the_baselines(page, server):
    page.goto(server[0])
    expect(page.locator("#about")).to_have_text(
        "calm: 3 tokens per step, context of 399 tokens; baseline: 1 token per step, context of 256 tokens"
    )
    expect(page.locator("#chat-row")).to_be_hidden()
    page.get_by_label("Prompt").fill("the <b>quick</b>")
    page.get_by_role("slider", name="Temperature").fill("0.5")
    page.get_by_label("Length, tokens").fill("30")
    page.get_by_label("Candidates").fill("16")
    page.get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Generate").click()
    ours, other = page.locator("section").nth(0), page.locator("section").nth(1)
    expect(ours.locator(".numbers")).to_contain_text("30 tokens in 10 steps, 20 saved against token by token")
    expect(other.locator(".numbers")).to_contain_text("30 tokens in 30 steps;")
    expect(ours.locator(".chunk")).to_have_count(10)
    expect(ours.locator(".prompt")).to_have_text("the <b>quick</b>")
    first = ours.locator(".text").inner_text()
    ours.locator(".chunk").nth(3).dispatch_event("mouseover")
    expect(ours.locator(".details")).to_contain_text("candidates drawn")
    expect(ours.locator(".details")).to_contain_text("agreement: 2 equal ones were asked for")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(ours.locator(".numbers")).to_contain_text("30 tokens")
    assert ours.locator(".text").inner_text() == first  # the same seed


def test_everything_can_be_done_with_the_keyboard(page, server):
    page.goto(server[0])
    page.get_by_label("Prompt").fill("a")
    page.get_by_label("Length, tokens").fill("12")
    page.get_by_label("Prompt").press("Control+Enter")
    section = page.locator("section").first
    expect(section.locator(".chunk")).to_have_count(4)
    section.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(section.locator(".chunk").nth(1)).to_have_class("chunk current")
    expect(section.locator(".details")).to_contain_text("3 tokens in")
    for control in page.locator("input:visible, select:visible, textarea, button").all():
        assert control.evaluate("e => (e.labels && e.labels.length) || e.textContent.trim()"), control


def test_stop_ends_the_text_and_frees_the_slot(page, server):
    address, services = server
    page.goto(address)
    page.get_by_label("Length, tokens").fill("250")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("section .chunk").nth(2)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    for _ in range(200):
        if not any(service.engine.num_running for service in services):
            break
        page.wait_for_timeout(10)
    assert not any(service.engine.num_running for service in services)


def test_an_error_is_shown(browser, server):
    page = browser.new_page()
    page.goto(server[0])
    expect(page.locator("section").first).to_be_visible()
    page.get_by_role("slider", name="Temperature").evaluate("e => { e.min = 0; e.value = 0.0 }")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("temperature must lie in (0, 1]")
    page.close()


def test_a_key_is_asked_for_where_one_is_needed(browser, calm, tokenizer):
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    with serving([("chat", (calm, chatting))], api_keys=["secret"]) as (address, services):
        services[0].engine.stepper.end_ids = set()
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("This server wants an API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("section .chunk").first).to_be_attached()
        page.get_by_label("as a message").check()
        page.get_by_label("Length, tokens").fill("6")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("section .numbers")).to_contain_text("6 tokens in 2 steps")
        page.close()


def test_the_page_fits_a_telephone_and_the_dark(browser, server):
    context = browser.new_context(viewport={"width": 380, "height": 800}, color_scheme="dark")
    page = context.new_page()
    page.goto(server[0])
    expect(page.locator("section").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    context.close()
