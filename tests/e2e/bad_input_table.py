"""Print what every bad input leads to: ``python -m tests.e2e.bad_input_table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.e2e.bad_input import CASES
from tests.e2e.bad_input_bench import Bench
from tests.e2e.processes import Commands


def main() -> None:
    """Print a Markdown table as the cases run."""
    print("| input | program | exit | what it prints |")
    print("|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as directory,
        Bench(Path(directory), Commands()) as bench,
    ):
        for case in CASES:
            program, code, line = case.run(bench)
            status = "lives on" if code is None else str(code)
            cells = (case.name, program, status, line)
            print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|", flush=True)


if __name__ == "__main__":
    main()
