"""Raster files that commands read."""

from __future__ import annotations

from typing import Any

from xchmv2.errors import CHMv2Error


def open_raster(path: str, chunks: dict[str, int] | None = None) -> Any:
    """Open a raster lazily, or refuse a file that holds several."""
    import rioxarray
    import xarray as xr

    raster = rioxarray.open_rasterio(path, chunks=chunks or {})
    if not isinstance(raster, xr.DataArray):
        raise CHMv2Error(
            f"one raster in {path!r}", "several", "name one, as gdalinfo lists its subdatasets"
        )
    return raster
