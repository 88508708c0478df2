"""``python -m xchmv2.benchmark``: measure this machine."""

from xchmv2.benchmark.command import main

if __name__ == "__main__":
    main(prog_name="python -m xchmv2.benchmark")
