"""What the chat page shows beside words: code, markdown, figures, sizes and colours."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page.browser import (
    LONG_ANSWER,
    answers,
    needs_chromium,
    opened,
    say,
)
from tests.page.stub import Stub

pytestmark = needs_chromium


def test_code_is_copied(page: Page, stub: Stub) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    stub.answer = "```\nif a < b:\n    stop()\n```"
    say(page, "Code, please")
    expect(page.locator("#send")).to_be_visible()
    button = page.locator(".code-head button")
    button.click()
    expect(button).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    stop()"


def test_markdown_is_shown_and_harmless(page: Page, stub: Stub) -> None:
    stub.answer = (
        "# Title\n\nSome **bold** and *italic*, `a < b`, 2 * 3 * 4, snake_case_name.\n\n"
        "- one\n- two\n  1. deep\n\n```python\nprint('<b>')\n```\n\n"
        "[good](https://example.org/a_b) [bad](javascript:alert(1)) "
        "![pixel](https://example.org/p.png)\n"
        "<img src=x onerror=alert(1)> <script>alert(1)</script>\n\n"
        "| a | b |\n|---|---|\n| 1 | **2** |\n\n> quoted"
    )
    say(page, "Show off")
    expect(page.locator("#send")).to_be_visible()
    body = answers(page).locator(".body")
    expect(body.locator("h3")).to_have_text("Title")
    expect(body.locator("p strong")).to_have_text("bold")
    expect(body.locator("em")).to_have_text("italic")
    expect(body.locator("p > code")).to_have_text("a < b")
    expect(body).to_contain_text("2 * 3 * 4, snake_case_name.")
    expect(body.locator("ul > li")).to_have_count(2)
    expect(body.locator("ul > li ol > li")).to_have_text("deep")
    expect(body.locator("pre")).to_have_text("print('<b>')")
    expect(body.locator("td strong")).to_have_text("2")
    expect(body.locator("blockquote")).to_have_text("quoted")
    links = body.locator("a")
    expect(links).to_have_count(2)
    expect(links.first).to_have_attribute("rel", re.compile("noopener"))
    expect(body).to_contain_text("[bad](javascript:alert(1))")
    expect(body).to_contain_text("<script>alert(1)</script>")
    expect(body.locator("img, script")).to_have_count(0)


def test_figures_and_what_the_cloud_received(page: Page, stub: Stub) -> None:
    stub.answer = LONG_ANSWER
    say(page, "Say a lot")
    figures = page.locator("#figures")
    expect(figures.locator("#answer-figures")).to_contain_text("44.8tokens/s")
    expect(figures.locator("#answer-figures")).to_contain_text("118 ms")
    expect(figures.locator("#link-figures")).to_contain_text("18 ms")
    expect(figures.locator("#sent-totals tbody tr")).to_have_count(2)
    expect(figures.locator("#sent-totals")).to_contain_text("ExchangeReply164")
    newest = figures.locator("#sent-recent li").first
    expect(newest).to_contain_text("1 \N{MULTIPLICATION SIGN} 384 · int6 · 324 B")
    expect(newest.locator(".mono")).to_have_text(re.compile(r"^(\S\d\.\d{3} ){5}…$"))
    # A step of one token: its hidden state and four answers of the adapter.
    expect(figures.locator("#sent-chart-text")).to_have_text("1,936 B")
    expect(figures.locator("#context-text")).to_have_text("47 of 2,048 tokens")


@pytest.mark.parametrize("width", [360, 768, 1360])
def test_nothing_sticks_out(browser: Browser, stub: Stub, width: int) -> None:
    with opened(browser, stub.address, width=width) as watched:
        page = watched.page
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(overflow) <= 0
        expect(page.locator("#latest")).to_be_hidden()
        stub.answer = f"{'endless' * 60}\n\n```\n{'wide ' * 80}\n```"
        say(page, "w" * 300)
        expect(page.locator("pre")).to_be_visible()
        assert page.evaluate(overflow) <= 0
        scroller = "(s => s.scrollWidth - s.clientWidth)(document.querySelector('#scroller'))"
        assert page.evaluate(scroller) <= 0
        if width < 800:
            page.get_by_role("button", name="Conversations").click()
            expect(page.locator("#sidebar")).to_be_in_viewport()
            page.keyboard.press("Escape")
            expect(page.locator("#sidebar")).not_to_be_in_viewport()


def test_theme_is_kept(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Light or dark").click()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark
