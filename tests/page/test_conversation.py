"""Conversations on the chat page, over a stub of the edge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.page.browser import (
    LONG_ANSWER,
    PATIENCE_MS,
    RECORD_ANNOUNCEMENTS,
    Watched,
    answers,
    expect_answer,
    needs_chromium,
    say,
    turns,
)
from tests.page.stub import Stub

pytestmark = needs_chromium


def test_two_turns(page: Page, stub: Stub) -> None:
    stub.answer = "The first answer."
    say(page, "A first question about nothing in particular, and rather a long one")
    expect_answer(page, "The first answer.")
    expect(page.locator("#title")).to_have_text("A first question about nothing in particular,…")
    stub.answer = "The second."
    say(page, "And a second")
    expect_answer(page, "The second.", count=2)
    assert [role for role, _ in turns(stub.requests[1])] == ["user", "assistant", "user"]
    assert stub.requests[1]["model"] == "calm"
    assert page.evaluate("document.activeElement.id") == "message"


def test_an_answer_is_announced_once(page: Page, stub: Stub) -> None:
    stub.answer = LONG_ANSWER
    page.evaluate(RECORD_ANNOUNCEMENTS)
    say(page, "Say a lot")
    expect_answer(page, LONG_ANSWER)
    assert page.evaluate("announced") == ["Answering", f"Answer: {LONG_ANSWER}"]


def test_the_keyboard_skips_to_the_message(page: Page) -> None:
    skip = page.get_by_role("link", name="Skip to the message field")
    expect(skip).not_to_be_in_viewport()
    skip.focus()
    expect(skip).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    # From there on: model, settings; the button to send needs something to send.
    for id in ("model", "open-settings"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == id


def test_shift_enter_makes_a_new_line(page: Page, stub: Stub) -> None:
    page.locator("#message").fill("One")
    page.locator("#message").press("Shift+Enter")
    page.locator("#message").press_sequentially("two")
    page.locator("#message").press("Enter")
    expect_answer(page, stub.answer)
    assert turns(stub.requests[0]) == [("user", "One\ntwo")]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_in_the_middle(page: Page, stub: Stub, way: str) -> None:
    stub.answer, stub.pieces = LONG_ANSWER, 5
    say(page, "Say a lot")
    expect(answers(page).locator(".body")).to_have_text(re.compile("word4"))
    if way == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("You stopped this answer.")
    expect_answer(page, "word0 word1 word2 word3 word4")
    assert stub.left.wait(PATIENCE_MS / 1000)
    # The conversation goes on from there.
    stub.answer, stub.pieces = "More.", None
    say(page, "Go on")
    expect_answer(page, "More.", count=2)
    assert ("assistant", "word0 word1 word2 word3 word4 ") in turns(stub.requests[1])


def test_another_answer_instead(page: Page, stub: Stub) -> None:
    say(page, "A question")
    expect_answer(page, stub.answer)
    stub.answer = "Another one."
    page.get_by_role("button", name="Retry").click()
    expect_answer(page, "Another one.")
    assert turns(stub.requests[1]) == [("user", "A question")]


def test_a_retry_that_fails_keeps_the_answer(watched: Watched, stub: Stub) -> None:
    page, watched.refused_requests_are_expected = watched.page, True
    say(page, "A question")
    expect_answer(page, stub.answer)
    stub.error = (429, "rate_limit_exceeded", "all conversations are in use")
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".error")).to_contain_text("The edge is busy")
    expect_answer(page, stub.answer)


def test_edit_and_ask_again(page: Page, stub: Stub) -> None:
    say(page, "A qestion")
    expect_answer(page, stub.answer)
    page.locator("#message").press("ArrowUp")
    field = page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    field.fill("A question")
    stub.answer = "Now I understand."
    field.press("Enter")
    expect_answer(page, "Now I understand.")
    expect(page.locator(".message.user .body")).to_have_text("A question")
    assert turns(stub.requests[1]) == [("user", "A question")]


def test_another_model_in_the_middle_is_marked(page: Page, stub: Stub) -> None:
    say(page, "A question")
    expect_answer(page, stub.answer)
    expect(page.locator(".marker")).to_have_count(0)
    page.locator("#model").select_option("base")
    expect(page.locator(".marker")).to_have_text("From here on: base")
    say(page, "And now?")
    expect_answer(page, stub.answer, count=2)
    assert [request["model"] for request in stub.requests] == ["calm", "base"]
    expect(page.locator(".marker")).to_have_count(1)
    expect(page.locator(".marker + .message.user + .message.assistant .who")).to_have_text("base")


def test_settings_go_with_the_request(page: Page, stub: Stub) -> None:
    page.locator("#open-settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens").fill("64")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Save").click()
    say(page, "A question")
    expect_answer(page, stub.answer)
    request = stub.requests[0]
    assert turns(request) == [("system", "Be brief."), ("user", "A question")]
    assert (request["temperature"], request["max_tokens"], request["seed"]) == (0.7, 64, 3)


def test_reload_keeps_the_conversation(page: Page, stub: Stub) -> None:
    say(page, "A question")
    expect_answer(page, stub.answer)
    stub.answer, stub.pieces = LONG_ANSWER, 5
    say(page, "Say a lot")
    expect(answers(page).last.locator(".body")).to_have_text(re.compile("word4"))
    page.locator("#message").fill("Half a thought")
    page.reload()
    expect(page.locator(".note")).to_contain_text("cut off when the page closed")
    expect_answer(page, "word0 word1 word2 word3 word4", count=2)
    expect(answers(page).first.locator(".body")).to_have_text("A short answer.")
    expect(page.locator("#message")).to_have_value("Half a thought")


def test_several_conversations(page: Page, stub: Stub) -> None:
    say(page, "About apples")
    expect_answer(page, stub.answer)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#empty")).to_be_visible()
    # An answer goes on while its conversation is out of sight.
    stub.pieces = 1
    say(page, "About pears")
    expect(answers(page).locator(".body")).to_have_text("A")
    page.get_by_role("link", name="About apples").click()
    expect_answer(page, stub.answer)
    expect(page.get_by_label("Answering")).to_be_visible()
    stub.go_on.set()
    expect(page.get_by_label("Answering")).to_have_count(0)
    page.go_back()
    expect_answer(page, stub.answer)
    expect(page.locator("#title")).to_have_text("About pears")

    page.locator("#more").click()
    page.locator("#rename").click()
    page.get_by_label("New name").fill("Fruit")
    page.get_by_label("New name").press("Enter")
    expect(page.locator("#title")).to_have_text("Fruit")

    page.get_by_role("link", name="Fruit").hover()
    page.get_by_role("button", name="Delete “Fruit”").click()
    expect(page.locator("#conversations li")).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations li")).to_have_count(2)
    expect(page.locator("#title")).to_have_text("Fruit")


def test_export(page: Page, stub: Stub) -> None:
    say(page, "What is 2 + 2?")
    expect_answer(page, stub.answer)
    files = {}
    for button in ("export-markdown", "export-json"):
        page.locator("#more").click()
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        files[download.value.suggested_filename] = Path(download.value.path()).read_text()
    expected = (
        "# What is 2 + 2?\n\n## You\n\nWhat is 2 + 2?\n\n## Answer (calm)\n\nA short answer.\n"
    )
    assert files["what-is-2-2.md"] == expected
    exported = json.loads(files["what-is-2-2.json"])
    assert [message["content"] for message in exported["messages"]] == [
        "What is 2 + 2?",
        "A short answer.",
    ]
