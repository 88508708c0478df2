"""Change of canopy height that can be defended: dates aligned, errors told, losses found."""

from xchmv2.change.align import align
from xchmv2.change.area import loss_area
from xchmv2.change.conditions import ComparisonWarning
from xchmv2.change.correlation import correlation_length
from xchmv2.change.difference import difference, difference_between
from xchmv2.change.events import events
from xchmv2.change.labelled import label_events
from xchmv2.change.masks import gain, loss
from xchmv2.change.stable import stable_bias
from xchmv2.change.transition import transition, transition_between
from xchmv2.change.trend import trend

__all__ = [
    "ComparisonWarning",
    "align",
    "correlation_length",
    "difference",
    "difference_between",
    "events",
    "gain",
    "label_events",
    "loss",
    "loss_area",
    "stable_bias",
    "transition",
    "transition_between",
    "trend",
]
