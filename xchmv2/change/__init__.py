"""Canopy height change: co-registration, level of detection, losses, events and trends."""

from xchmv2.change.alignment import align
from xchmv2.change.dates import ComparisonWarning
from xchmv2.change.differencing import difference, difference_between
from xchmv2.change.error_models import ErrorModel, correlation_length, error_model
from xchmv2.change.event_detection import events
from xchmv2.change.event_labels import label_events
from xchmv2.change.loss_areas import loss_area
from xchmv2.change.masks import gain, loss
from xchmv2.change.stable_ground import stable_bias
from xchmv2.change.transitions import transition, transition_between
from xchmv2.change.trends import trend

__all__ = [
    "ComparisonWarning",
    "ErrorModel",
    "align",
    "correlation_length",
    "difference",
    "difference_between",
    "error_model",
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
