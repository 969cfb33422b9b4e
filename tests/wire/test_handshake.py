"""Whether two ends belong together."""

from __future__ import annotations

import dataclasses

import pytest

from privatelora.errors import PartitionError, RemoteProtocolError
from privatelora.runtime.wire.handshake import Agreement, check_hello
from privatelora.runtime.wire.messages import Fingerprints
from tests.wire.samples import CLOUD_HELLO, EDGE_HELLO, PRINTS


def test_each_end_takes_the_first_of_its_own_codecs() -> None:
    assert check_hello(EDGE_HELLO, CLOUD_HELLO) == Agreement("bf16", 2**20)
    assert check_hello(CLOUD_HELLO, EDGE_HELLO) == Agreement("fp32", 2**20)
    only_fp32 = dataclasses.replace(CLOUD_HELLO, codecs=("int8", "fp32"))
    assert check_hello(EDGE_HELLO, only_fp32).codec == "fp32"


@pytest.mark.parametrize(
    ("prints", "differing", "equal"),
    [
        (Fingerprints("d" * 64, "b" * 64, "c" * 64), ["model"], ["plan", "basis"]),
        (Fingerprints("a" * 64, "d" * 64, "c" * 64), ["plan"], ["model", "basis"]),
        (Fingerprints("a" * 64, "b" * 64, "d" * 64), ["basis"], ["model", "plan"]),
        (Fingerprints("d" * 64, "d" * 64, "d" * 64), ["model", "plan", "basis"], []),
    ],
)
def test_what_differs_is_named(
    prints: Fingerprints, differing: list[str], equal: list[str]
) -> None:
    theirs = dataclasses.replace(CLOUD_HELLO, fingerprints=prints)
    with pytest.raises(PartitionError) as caught:
        check_hello(EDGE_HELLO, theirs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    for what in differing:
        assert f"{what} (edge {getattr(PRINTS, what)[:12]}, cloud dddddddddddd)" in text
    for what in equal:
        assert f"{what} (edge" not in text


def test_two_ends_of_one_role_do_not_belong_together() -> None:
    with pytest.raises(RemoteProtocolError, match="both ends are edge"):
        check_hello(EDGE_HELLO, EDGE_HELLO)


def test_without_a_common_codec_nothing_can_be_sent() -> None:
    theirs = dataclasses.replace(CLOUD_HELLO, codecs=("int8",))
    with pytest.raises(RemoteProtocolError, match=r"bf16, fp32.*int8"):
        check_hello(EDGE_HELLO, theirs)
