"""The chat page in a real browser, over a stub of the edge, and over the daemons themselves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.page_stub import Stub, serve
from tests.e2e.processes import EDGE, SERVE, Process

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

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

LONG_ANSWER = " ".join(f"word{number}" for number in range(40))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Stub]:
    with serve(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(server: Stub) -> Iterator[Stub]:
    yield server
    server.go_on.set()
    server.reset()


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


@pytest.fixture
def watched(browser: Browser, stub: Stub) -> Iterator[Watched]:
    with opened(browser, stub.address) as watched:
        expect(watched.page.locator("#model")).to_have_value("calm")
        yield watched


@pytest.fixture
def page(watched: Watched) -> Page:
    return watched.page


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


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    directory = tmp_path_factory.mktemp("page")
    options = {"max_position_embeddings": 4096}
    return tiny_deployment("llama", directory, model_options=options, rank_up=8, rank_down=8)[0]


def test_with_the_daemons(browser: Browser, deployment: Deployment) -> None:
    """Two models, a long answer stopped, and a cloud that goes and comes back."""
    (deployment.directory / "key").write_text("secret\n")
    config: dict[str, Any] = {
        "adapter": None,
        "adapters": {"calm": "adapter.safetensors"},
        "max_positions": 4096,
        "sampling": {"max_tokens": 20, "ignore_eos": True},
        "http": {"listen": "127.0.0.1:0", "api_key": {"file": "key"}},
    }
    with ExitStack() as stack:
        cloud = stack.enter_context(Process(SERVE, deployment.cloud_yaml()))
        address = cloud.read_ready()
        edge = stack.enter_context(Process(EDGE, deployment.edge_yaml(address, **config)))
        with opened(browser, edge.read_ready()) as watched:
            page, watched.refused_requests_are_expected = watched.page, True
            page.get_by_role("dialog").get_by_label("API key").fill("secret")
            page.get_by_role("button", name="Use this key").click()
            expect(page.locator("#model option")).to_have_text(["calm", "base"])
            expect(page.locator("#link-pill")).to_have_attribute("data-state", "connected")
            expect(page.locator("#cloud-address")).to_have_text(address)

            say(page, "How many apples?")
            expect(answers(page).locator(".took")).to_contain_text("20 tokens")
            expect(page.locator("#answer-figures")).to_contain_text("Round trips4/token")
            totals = page.locator("#sent-totals")
            expect(totals).to_contain_text(re.compile(r"StepBegin20[\d,.]+ k?B"))
            # Besides the first point, which is folded, a step reads three of the adapter's.
            expect(totals).to_contain_text(re.compile(r"ExchangeReply60[\d,.]+ k?B"))
            newest = page.locator("#sent-recent li", has_text="ExchangeReply").first
            expect(newest).to_contain_text("fp32")
            expect(newest.locator(".mono")).to_have_text(re.compile(r"^\S\d+\.\d+ "))

            page.locator("#model").select_option("base")
            page.locator("#open-settings").click()
            page.get_by_label("Most tokens").fill("4000")
            page.get_by_role("button", name="Save").click()
            say(page, "And pears?")
            expect(answers(page).last.locator(".body")).to_have_text(re.compile("."))
            page.keyboard.press("Escape")
            note = answers(page).last.locator(".note")
            expect(note).to_have_text("You stopped this answer.")
            expect(answers(page).last.locator(".who")).to_have_text("base")

            cloud.terminate()
            assert cloud.wait() == 0
            say(page, "Still there?")
            expect(page.locator(".error")).to_contain_text("The cloud is away")
            cloud = stack.enter_context(
                Process(SERVE, deployment.cloud_yaml("again.yaml", listen=address))
            )
            assert cloud.read_ready() == address
            page.get_by_role("button", name="Retry").click()
            expect(answers(page).last.locator(".body")).to_have_text(re.compile("."))
            page.locator("#stop").click()
            expect(page.locator(".error")).to_have_count(0)
        for process in (edge, cloud):
            process.terminate()
            assert process.wait() == 0
