"""Print what every bad input leads to: ``python -m tests.e2e.bad_input_table``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.e2e.bad_input import CASES, Bench
from tests.e2e.processes import Commands


def main() -> None:
    """Print a Markdown table as the cases run."""
    print("| input | program | exit | what it prints |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory, Commands() as commands:
        bench = Bench(Path(directory), commands)
        try:
            for case in CASES:
                program, code, line = case.run(bench)
                status = "lives on" if code is None else str(code)
                line = line.replace("|", "\\|")
                print(f"| {case.name} | {program} | {status} | {line} |", flush=True)
        finally:
            bench.close()


if __name__ == "__main__":
    main()
