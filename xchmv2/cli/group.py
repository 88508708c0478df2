"""How commands end: exit code 0, 1 and one line where the input is at fault, 2 for wrong usage."""

from __future__ import annotations

import errno
from typing import Any

import click

from xchmv2.errors import CHMv2Error


class Commands(click.Group):
    """A group of commands whose errors are for people."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List commands in the order they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn an error of the input into one line and exit code 1."""
        try:
            return super().invoke(ctx)
        except (CHMv2Error, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe went away: click ends quietly
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
