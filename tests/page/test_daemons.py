"""The chat page over the daemons themselves."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.deployment import Deployment, tiny_deployment
from tests.e2e.processes import EDGE, SERVE, Process
from tests.page.browser import (
    answers,
    needs_chromium,
    opened,
    say,
)

pytestmark = needs_chromium


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
            expect(page.locator("#stop")).to_be_visible()  # it waits, and can be told not to
            cloud = stack.enter_context(
                Process(SERVE, deployment.cloud_yaml("again.yaml", listen=address))
            )
            assert cloud.read_ready() == address
            expect(answers(page).last.locator(".body")).to_have_text(re.compile("."))
            page.locator("#stop").click()
            expect(page.locator(".error")).to_have_count(0)
        for process in (edge, cloud):
            process.terminate()
            assert process.wait() == 0
