"""Progress bars: widgets in a notebook that has ipywidgets, text anywhere else."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Text will do; a warning at the first bar would not tell anyone more.
    warnings.filterwarnings("ignore", "IProgress not found")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
