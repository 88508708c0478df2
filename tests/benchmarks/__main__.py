"""``python -m tests.benchmarks``: measure this machine."""

from __future__ import annotations

from .command import main

if __name__ == "__main__":
    main(prog_name="python -m tests.benchmarks")
