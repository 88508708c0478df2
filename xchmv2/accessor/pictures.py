"""Pictures of heights and their change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xchmv2.accessor.held import Held, T

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from xchmv2.plotting.canvas import Picture


class PictureMethods(Held[T]):
    """Methods of heights, or a Dataset with ``canopy_height``; ``plot_change`` of a change."""

    def plot(
        self,
        *,
        ax: Axes | None = None,
        limits: tuple[float, float] | None = None,
        columns: int = 3,
        scale_bar: bool = True,
    ) -> Picture:
        """Draw canopy height; see :func:`xchmv2.plotting.plot_height`."""
        from xchmv2.plotting import plot_height

        return plot_height(self._obj, ax=ax, limits=limits, columns=columns, scale_bar=scale_bar)

    def plot_change(
        self,
        *,
        ax: Axes | None = None,
        limit: float | None = None,
        only_significant: bool = False,
        columns: int = 3,
        scale_bar: bool = True,
    ) -> Picture:
        """Draw the change of canopy height; see :func:`xchmv2.plotting.plot_change`."""
        from xchmv2.plotting import plot_change

        return plot_change(
            self._obj,
            ax=ax,
            limit=limit,
            only_significant=only_significant,
            columns=columns,
            scale_bar=scale_bar,
        )

    def plot_series(
        self, places: Any, *, label: str | None = None, ax: Axes | None = None
    ) -> Picture:
        """Draw canopy height over time; see :func:`xchmv2.plotting.plot_series`."""
        from xchmv2.plotting import plot_series

        return plot_series(self._obj, places, label=label, ax=ax)

    def plot_validation(
        self,
        reference: Any,
        *,
        column: str | None = None,
        radius: float = 12.0,
        percentile: float = 98.0,
    ) -> Picture:
        """Draw heights against their reference; see :func:`xchmv2.plotting.plot_validation`."""
        from xchmv2.plotting import plot_validation

        return plot_validation(
            self._obj, reference, column=column, radius=radius, percentile=percentile
        )
