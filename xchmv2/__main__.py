"""``python -m xchmv2``: the command line."""

from __future__ import annotations

from xchmv2.cli import main

if __name__ == "__main__":
    main(prog_name="xchmv2")
