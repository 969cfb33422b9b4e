"""What came of a run, for people."""

from __future__ import annotations

from collections.abc import Sequence

from tests.chaos.growth import MIN_LIFETIME_S
from tests.chaos.outcome import Outcome

_COLUMNS = (
    ("transport", lambda o: o.transport),
    ("faults", lambda o: str(sum(o.faults.values()))),
    ("finished", lambda o: str(o.finished)),
    ("equal", lambda o: str(o.equal)),
    ("different", lambda o: str(o.different)),
    ("lost", lambda o: str(o.lost)),
    ("hung", lambda o: str(o.hung)),
    ("asked again", lambda o: str(o.asked_again)),
    ("tokens", lambda o: str(o.tokens)),
    ("longest pause", lambda o: f"{o.longest_pause_s:.1f} s"),
    ("failures", lambda o: str(len(o.failures))),
)


def report(outcomes: Sequence[Outcome]) -> str:
    """All tables, and every failure with what is needed to see it again."""
    blocks = [
        _table([name for name, _ in _COLUMNS], [[f(o) for _, f in _COLUMNS] for o in outcomes])
    ]
    kinds = sorted({kind for outcome in outcomes for kind in outcome.faults})
    names = [outcome.transport for outcome in outcomes]
    if kinds:
        rows = [[kind, *(str(o.faults.get(kind, 0)) for o in outcomes)] for kind in kinds]
        blocks.append(_table(["faults", *names], rows))
    blocks += _growth(outcomes)
    blocks += [text for outcome in outcomes for text in _failures(outcome)]
    return "\n\n".join(blocks)


def _growth(outcomes: Sequence[Outcome]) -> list[str]:
    rows = []
    for outcome in outcomes:
        for daemon, growth in outcome.growth.items():
            others = ", ".join(f"{value:+g} {name}" for name, value in growth.others.items())
            rows.append(
                [
                    f"{outcome.transport} {daemon}",
                    f"{growth.lifetime_s:.0f} s",
                    f"{growth.memory_mib:+.1f} MiB",
                    f"{growth.descriptors:+g}",
                    f"{growth.threads:+g}",
                    others,
                ]
            )
    if not rows:
        return []
    note = (
        "From the second to the last quarter of each daemon's longest life; one of less than "
        f"{MIN_LIFETIME_S:.0f} s says little."
    )
    return [_table(["growth", "over", "memory", "descriptors", "threads", ""], rows) + "\n" + note]


def _failures(outcome: Outcome) -> list[str]:
    texts = []
    for failure in outcome.failures:
        lines = [
            f"FAILURE of {outcome.transport}, {failure.at_s:.1f} s after its beginning: "
            f"{failure.what}",
            f"  again: python -m tests.chaos --seed {outcome.seed} "
            f"--transport {outcome.transport} --minutes {outcome.seconds / 60 + 0.1:.1f}",
            f"  faults before it: {'; '.join(failure.faults) or 'none'}",
        ]
        for name, log in failure.logs.items():
            lines += [f"  log of {name}:", *(f"    {line}" for line in log)]
        texts.append("\n".join(lines))
    return texts


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    )
