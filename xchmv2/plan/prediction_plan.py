"""A plan as it is shown: :class:`PredictionPlan`."""

from __future__ import annotations

from dataclasses import dataclass

from xchmv2.display import as_html, as_text
from xchmv2.plan.facts import PlannedWork
from xchmv2.plan.picture import draw_grid
from xchmv2.plan.rows import write_rows

_TITLE = "xchmv2 prediction plan, nothing computed yet"


@dataclass(frozen=True, repr=False)
class PredictionPlan(PlannedWork):
    """What a prediction will do, from :func:`xchmv2.plan.plan`; printed, it tells it in lines.

    Its parameters and attributes are those of `PlannedWork`.
    """

    def __repr__(self) -> str:
        return as_text(f"<{_TITLE}>", write_rows(self))

    def _repr_html_(self) -> str:
        return as_html(_TITLE, write_rows(self), draw_grid(self.job))
