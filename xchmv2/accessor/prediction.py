"""From imagery to heights in a store."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from xchmv2 import defaults
from xchmv2.accessor.held import Held, T

if TYPE_CHECKING:
    from xchmv2.imagery import ValueRange
    from xchmv2.inference import Layer, ModelLike
    from xchmv2.plan import PredictionPlan
    from xchmv2.store.encodings import EncodingName
    from xchmv2.store.locations import StoreLike
    from xchmv2.store.regions import Regions


class PredictionMethods(Held[T]):
    """Methods of imagery, and of anything to be stored."""

    def predict(
        self,
        model: ModelLike = defaults.MODEL,
        *,
        bands: Sequence[Hashable] | None = None,
        value_range: ValueRange | None = None,
        nodata: float | None = None,
        valid: xr.DataArray | None = None,
        erode: int = 0,
        resolution: float | None = None,
        tile: int = defaults.TILE,
        overlap: int = defaults.OVERLAP,
        block: int | None = None,
        layers: Layer | Sequence[Layer] = ("height",),
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
        compile: bool = False,
    ) -> xr.DataArray | xr.Dataset:
        """Predict canopy height; see :func:`xchmv2.predict.predict`."""
        from xchmv2.predict import predict

        return predict(
            self._obj,
            model,
            bands=bands,
            value_range=value_range,
            nodata=nodata,
            valid=valid,
            erode=erode,
            resolution=resolution,
            tile=tile,
            overlap=overlap,
            block=block,
            layers=layers,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile,
        )

    def plan(
        self,
        model: ModelLike = defaults.MODEL,
        *,
        bands: Sequence[Hashable] | None = None,
        value_range: ValueRange | None = None,
        nodata: float | None = None,
        valid: xr.DataArray | None = None,
        erode: int = 0,
        resolution: float | None = None,
        tile: int = defaults.TILE,
        overlap: int = defaults.OVERLAP,
        block: int | None = None,
        layers: Layer | Sequence[Layer] = ("height",),
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        batch_size: int | Literal["auto"] = "auto",
        compile: bool = False,
    ) -> PredictionPlan:
        """Tell what ``predict`` will do; see :func:`xchmv2.plan.plan`."""
        from xchmv2.plan import plan

        return plan(
            self._obj,
            model,
            bands=bands,
            value_range=value_range,
            nodata=nodata,
            valid=valid,
            erode=erode,
            resolution=resolution,
            tile=tile,
            overlap=overlap,
            block=block,
            layers=layers,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile,
        )

    def to_zarr(
        self,
        store: StoreLike,
        *,
        encoding: EncodingName = "float32",
        resume: bool = True,
        regions: Regions | None = None,
        shards: bool = False,
        progress: bool = True,
        compute: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Write to a Zarr store that survives a kill; see :func:`xchmv2.store.to_zarr`."""
        from xchmv2.store import to_zarr

        return to_zarr(
            self._obj,
            store,
            encoding=encoding,
            resume=resume,
            regions=regions,
            shards=shards,
            progress=progress,
            compute=compute,
            storage_options=storage_options,
        )
