"""The command-line tool ``llm``, unmodified, against both daemons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.deployment import tiny_deployment
from tests.e2e.http_world import HttpWorld, http_world
from tests.e2e.processes import PATIENCE_S, usual_environment

QUESTION = "How many apples has she?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpWorld]:
    options = {"max_position_embeddings": 1024}
    directory = tmp_path_factory.mktemp("llm")
    deployment, _ = tiny_deployment(
        "llama", directory, model_options=options, rank_up=8, rank_down=8
    )
    with http_world(deployment, sampling={"max_tokens": 30}) as started:
        yield started


@pytest.fixture(scope="module")
def user_path(world: HttpWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tool is told of this edge, as its documentation says."""
    directory = tmp_path_factory.mktemp("llm-user")
    common = {"model_name": "adapter", "api_base": f"{world.url}/v1"}
    models = [
        {"model_id": "mine", "supports_schema": True, **common},
        {"model_id": "mine-plain", "completion": True, **common},
    ]
    (directory / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    return directory


def llm(user_path: Path, *arguments: str) -> str:
    """Run the tool; what it prints."""
    changes = {
        "LLM_USER_PATH": str(user_path),
        "LLM_LOAD_PLUGINS": "",  # none of those that happen to be installed
        "OPENAI_API_KEY": "unused",
    }
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env={**usual_environment(), **changes},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_it_streams_and_it_waits(user_path: Path) -> None:
    streamed = llm(user_path, "-m", "mine", QUESTION)
    assert len(streamed) > 5
    assert llm(user_path, "-m", "mine", "--no-stream", QUESTION) == streamed
    assert llm(user_path, "-m", "mine", "-o", "max_tokens", "3", QUESTION) != streamed


def test_it_continues_text_and_a_conversation(user_path: Path) -> None:
    assert len(llm(user_path, "-m", "mine-plain", "-o", "max_tokens", "20", QUESTION)) > 5
    llm(user_path, "-m", "mine", QUESTION)
    assert len(llm(user_path, "-c", "And the weather?")) > 5
    logs: Any = json.loads(llm(user_path, "logs", "--json", "-n", "1"))
    assert logs[0]["output_tokens"] > 0


def test_it_asks_for_json(user_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"red": {"type": "boolean"}},
        "required": ["red"],
        "additionalProperties": False,
    }
    options = ("-o", "max_tokens", "200", "--schema", json.dumps(schema))
    answer = json.loads(llm(user_path, "-m", "mine", *options, QUESTION))
    assert isinstance(answer["red"], bool)
