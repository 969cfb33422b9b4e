"""A browser, and a stub of the edge, for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.page.browser import ARGUMENTS, CHROMIUM, PATIENCE_MS, Watched, opened
from tests.page.stub import Stub, serve


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server() -> Iterator[Stub]:
    with serve(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(server: Stub) -> Iterator[Stub]:
    yield server
    server.go_on.set()
    server.reset()


@pytest.fixture
def watched(browser: Browser, stub: Stub) -> Iterator[Watched]:
    with opened(browser, stub.address) as watched:
        expect(watched.page.locator("#model")).to_have_value("calm")
        yield watched


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page
