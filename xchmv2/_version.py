"""The version of this package: the one place it is written down."""

from __future__ import annotations

__version__ = "0.2.0"
