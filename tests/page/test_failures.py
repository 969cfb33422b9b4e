"""What the chat page says when something is wrong, and that no conversation is lost."""

from __future__ import annotations

import re

from playwright.sync_api import Browser, Page, expect

from tests.page.browser import (
    LONG_ANSWER,
    Watched,
    answers,
    expect_answer,
    needs_chromium,
    opened,
    say,
)
from tests.page.stub import Stub, serve

pytestmark = needs_chromium


def test_key_is_asked_for_and_kept(browser: Browser, stub: Stub) -> None:
    stub.key = "right"
    with opened(browser, stub.address) as watched:
        page, watched.refused_requests_are_expected = watched.page, True
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-problem")).to_contain_text("did not accept")
        dialog.get_by_label("API key").fill("right")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#model")).to_have_value("calm")
        expect(dialog).to_have_count(0)
        page.reload()
        expect(page.locator("#model")).to_have_value("calm")
        say(page, "A question")
        expect_answer(page, stub.answer)
        # A key that stops being right is asked for again, and the question is not lost.
        stub.key = "new"
        say(page, "Another")
        dialog.get_by_label("API key").fill("new")
        dialog.get_by_role("button", name="Use this key").click()
        expect_answer(page, stub.answer, count=2)


def test_cloud_away_and_back(watched: Watched, stub: Stub) -> None:
    page, watched.refused_requests_are_expected = watched.page, True
    expect(page.locator("#link-pill")).to_have_attribute("data-state", "connected")
    stub.cloud_away = True
    say(page, "Are you there?")
    expect(page.locator(".error")).to_contain_text("The cloud is away")
    expect(page.locator(".error")).to_contain_text("cannot reach tls://cloud.example:18230")
    expect(page.locator("#link-pill")).to_have_attribute("data-state", "away")
    page.reload()
    expect(page.locator(".message.user .body")).to_have_text("Are you there?")
    stub.cloud_away = False
    page.get_by_role("button", name="Retry").click()
    expect_answer(page, stub.answer)
    expect(page.locator(".error")).to_have_count(0)


def test_cloud_lost_in_the_middle(watched: Watched, stub: Stub) -> None:
    page = watched.page
    stub.answer, stub.pieces = LONG_ANSWER, 3
    stub.error = (0, "cloud_unreachable", "the cloud closed the connection")
    say(page, "Say a lot")
    expect(answers(page).locator(".body")).to_have_text(re.compile("word2"))
    stub.go_on.set()
    expect(page.locator(".error")).to_contain_text("The cloud is away")
    expect_answer(page, "word0 word1 word2")


def test_too_long(watched: Watched, stub: Stub) -> None:
    page, watched.refused_requests_are_expected = watched.page, True
    stub.error = (400, "context_length_exceeded", "4000 tokens do not fit the context of 2048")
    say(page, "Much")
    expect(page.locator(".error")).to_contain_text("Too long for this model")
    expect(page.locator(".error")).to_contain_text("begin a new conversation")
    stub.error = None
    page.get_by_role("button", name="Retry").click()
    expect_answer(page, stub.answer)


def test_edge_stopped(browser: Browser) -> None:
    with serve(Stub()) as stub, opened(browser, stub.address) as watched:
        page, watched.refused_requests_are_expected = watched.page, True
        say(page, "A question")
        expect_answer(page, stub.answer)
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        say(page, "Still there?")
        expect(page.locator(".error")).to_contain_text("The edge is not running")
        expect(page.locator("#link-text")).to_have_text("Edge not running")
        page.unroute("**/v1/**")
        page.get_by_role("button", name="Retry").click()
        expect_answer(page, stub.answer, count=2)


def test_full_storage_is_said(page: Page, stub: Stub) -> None:
    page.evaluate("""() => {
        for (let size = 2 ** 22; size >= 1; size >>= 1) {
            const text = "x".repeat(size);
            try { for (let n = 0; ; n += 1) localStorage.setItem(`x${size}.${n}`, text); }
            catch { /* full */ }
        }
    }""")
    say(page, "A question")
    expect_answer(page, stub.answer)
    expect(page.locator(".notice")).to_contain_text("storage is full")
    say(page, "Another")
    expect_answer(page, stub.answer, count=2)


def test_conversations_are_bounded(page: Page, stub: Stub) -> None:
    page.evaluate("""() => {
        for (let n = 0; n < 100; n += 1) {
            const id = `old${n}`;
            const entry = { id, title: `Old ${n}`, updated: n, model: "calm", messages: [] };
            localStorage.setItem(`privatelora.conversation.${id}`, JSON.stringify(entry));
        }
        localStorage.setItem("privatelora.conversation.broken", "{");
    }""")
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(100)
    say(page, "One more")
    expect_answer(page, stub.answer)
    expect(page.locator("#conversations li")).to_have_count(100)
    expect(page.locator(".notice")).to_contain_text("the oldest, “Old 0”, made room")
