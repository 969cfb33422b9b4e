"""Results of benchmarks: their shape, and what two of them have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from privatelora.benchmarks.result import Result, compare, read_result, stamped
from privatelora.errors import ConfigError


def row(sessions: int, low: float, high: float, **more: Any) -> dict[str, Any]:
    rate = {"median": (low + high) / 2, "min": low, "max": high, "runs": [low, high]}
    return {"sessions": sessions, "scheduling": "ours", "tokens_per_s": rate, **more}


def result(*rows: dict[str, Any], **more: Any) -> Result:
    return Result.model_validate({"benchmark": "serve", "rows": list(rows), **more})


def test_rows_about_the_same_are_compared_whatever_their_order() -> None:
    first = result(row(1, 4, 6), row(8, 10, 12, gap_ms=3.0))
    second = result(row(8, 22, 24, gap_ms=6.0), row(1, 5, 7), row(16, 1, 1))
    one, eight, gap = compare(first, second)
    assert (one.about, one.figure) == ("sessions 1, scheduling ours", "tokens_per_s")
    assert (one.first, one.second, one.ratio, one.is_within) == (5, 6, 1.2, True)
    assert (eight.ratio, eight.is_within) == (23 / 11, False)
    assert (gap.figure, gap.ratio, gap.is_within) == ("gap_ms", 2, None)


def test_tables_of_their_own_are_compared_too() -> None:
    def nested(rate: float) -> Result:
        part = {"every": 6, "rows": [{"engine": "split", "rate": rate}], "split_vs_it": rate / 2}
        return result(arrangements=[part])

    changes = compare(nested(4), nested(8))
    assert {(change.about, change.figure) for change in changes} == {
        ("every 6", "split_vs_it"),
        ("every 6, engine split", "rate"),
    }
    assert {change.ratio for change in changes} == {2}


def test_rows_that_say_the_same_are_told_apart_by_order() -> None:
    first, second = result({"ms": 1.0}, {"ms": 2.0}), result({"ms": 3.0}, {"ms": 8.0})
    assert [change.ratio for change in compare(first, second)] == [3, 4]


def test_different_benchmarks_have_nothing_in_common() -> None:
    with pytest.raises(ConfigError, match="result of serve, the second of http"):
        compare(result(), Result(benchmark="http"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    text = "Speed.\n\nMethod. Twice,\nin turns.\n"
    file.write_text(json.dumps(stamped({"benchmark": "serve", "method": text, "rows": []})))
    read = read_result(file)
    assert (read.schema_version, read.method) == (1, "Twice, in turns.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "valid dictionary"),
        ('{"rows": []}', "benchmark: Field required"),
        ('{"benchmark": "serve", "schema_version": 2}', "schema_version"),
        ('{"benchmark": "serve", "rows": [3]}', "rows"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason) as refused:
        read_result(file)
    assert str(file) in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_result(tmp_path / "none.json")
