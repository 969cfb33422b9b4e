"""A page in a real browser, found out if it does what it should not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 20_000

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

LONG_ANSWER = " ".join(f"word{number}" for number in range(40))


class Watched:
    """A page that is found out if it asks elsewhere, complains, or breaks its policy."""

    def __init__(self, context: BrowserContext, address: str) -> None:
        self.address = address
        self.complaints: list[str] = []
        self.refused_requests_are_expected = False
        context.on("request", lambda request: self._check_origin(request.url))
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.blockedURI))"
        )

    def _check_origin(self, url: str) -> None:
        if not url.startswith((f"{self.address}/", f"blob:{self.address}/")):
            self.complaints.append(f"asked {url}")

    def _note(self, kind: str, text: str) -> None:
        if self.refused_requests_are_expected and "Failed to load resource" in text:
            return
        if kind in ("error", "warning"):
            self.complaints.append(text)


RECORD_ANNOUNCEMENTS = """() => {
    window.announced = [];
    const announcer = document.querySelector("#announcer");
    new MutationObserver(() => announced.push(announcer.textContent))
        .observe(announcer, { childList: true, characterData: true, subtree: true });
}"""


@contextmanager
def opened(browser: Browser, address: str, *, width: int = 1360) -> Iterator[Watched]:
    """The page in a browser without any past."""
    context = browser.new_context(viewport={"width": width, "height": 860}, accept_downloads=True)
    watched = Watched(context, address)
    try:
        watched.page.goto(address)
        yield watched
    finally:
        context.close()
    assert watched.complaints == []


def say(page: Page, text: str) -> None:
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


def expect_answer(page: Page, text: str, *, count: int = 1) -> None:
    """The last of ``count`` answers is finished and says ``text``."""
    expect(answers(page)).to_have_count(count)
    expect(answers(page).last.locator(".body")).to_have_text(text)
    expect(page.locator("#send")).to_be_visible()


def turns(request: dict[str, object]) -> list[tuple[str, str]]:
    messages = request["messages"]
    assert isinstance(messages, list)
    return [(turn["role"], turn["content"]) for turn in messages]
