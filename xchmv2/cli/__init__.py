"""The command line: ``xchmv2 predict``, ``run``, ``demo``, ``fine-tune``.

What it says is for people to read. Commands import what they need when they run, so that help comes
at once.
"""

from __future__ import annotations

import click

from xchmv2._version import __version__
from xchmv2.cli.demo import demo
from xchmv2.cli.fine_tune import fine_tune
from xchmv2.cli.group import Commands
from xchmv2.cli.predict import predict
from xchmv2.cli.run import run

__all__ = ["main"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="xchmv2")
def main() -> None:
    """Canopy height in metres from high-resolution RGB imagery."""


for command in (predict, run, demo, fine_tune):
    main.add_command(command)
