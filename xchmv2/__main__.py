"""``python -m xchmv2``: the command line."""

from xchmv2.cli import main

if __name__ == "__main__":
    main(prog_name="xchmv2")
