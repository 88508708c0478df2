"""The empty store: metadata, coordinates, CRS, and arrays in which nothing is written yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dask.array as da
import xarray as xr
import zarr
from zarr.abc.store import Store

from xchmv2.imagery import find_grid
from xchmv2.store.cube import Cube
from xchmv2.store.encodings import Encoding

# Registered conventions of Zarr for the CRS and the grid, by their identifiers.
_CONVENTIONS = (
    {"name": "proj:", "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f"},
    {"name": "spatial:", "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4"},
)

_ENCODED = ("_FillValue", "missing_value", "scale_factor", "add_offset", "coordinates")


def write_template(
    store: Store, cube: Cube, encodings: Mapping[str, Encoding], *, shards: bool
) -> None:
    """Write everything but the pixels.

    Parameters
    ----------
    store : zarr Store
        An empty one.
    cube : Cube
        What will be written, dates in their final order.
    encodings : mapping
        How each variable is stored.
    shards : bool
        Whether the chunks of a block go into one shard.
    """
    leading = (1,) * (cube.date_dim is not None)
    layout: dict[str, Any] = {"chunks": (*leading, *cube.chunk)}
    if shards:
        layout["shards"] = (*leading, *cube.block)
    dataset = cube.dataset.assign(
        {
            name: (variable.dims, _nothing(variable), _attrs(variable))
            for name, variable in cube.dataset.data_vars.items()
        }
    ).assign_attrs({"Conventions": "CF-1.11", **georeference(cube)})
    encoding: dict[Any, dict[str, Any]] = {
        name: {"chunks": cube.block} for name, c in dataset.coords.items() if c.dims == cube.dims
    }
    encoding |= {name: {**layout, **e.for_xarray} for name, e in encodings.items()}
    _plain_coordinates(dataset).to_zarr(
        store,
        mode="a",
        zarr_format=3,
        consolidated=False,
        compute=False,
        safe_chunks=False,
        encoding=encoding,
    )


def write_coordinates(store: Store, path: str, cube: Cube) -> list[str]:
    """Write the coordinates along the dates into a group of their own; returns their names."""
    along = [str(n) for n, c in cube.dataset.coords.items() if cube.date_dim in c.dims]
    _plain_coordinates(cube.dataset[along]).to_zarr(
        store, group=path, mode="w", zarr_format=3, consolidated=False
    )
    return along


def data_arrays(store: Store, cube: Cube) -> tuple[zarr.Array[Any], ...]:
    """Open the arrays of a store that hold pixels."""
    return tuple(zarr.open_array(store, path=name, mode="r+") for name in cube.arrays)


def georeference(cube: Cube) -> dict[str, Any]:
    """CRS and grid as attributes of a group; empty without a CRS."""
    grid = find_grid(next(iter(cube.dataset.data_vars.values())))
    if grid.crs is None:
        return {}
    box = grid.geobox
    code = grid.crs.authority
    crs = {"proj:code": ":".join(map(str, code))} if all(code) else {"proj:wkt2": grid.crs.to_wkt()}
    return {
        "zarr_conventions": [dict(convention) for convention in _CONVENTIONS],
        **crs,
        "spatial:dimensions": list(grid.dims),
        "spatial:shape": list(grid.shape),
        "spatial:transform": list(box.transform[:6]),
        "spatial:bbox": list(box.boundingbox.bbox),
        "spatial:registration": "pixel",
    }


def _attrs(variable: xr.DataArray) -> dict[str, Any]:
    """Attributes as they are stored, without those that tell how the source was encoded."""
    mapping = variable.encoding.get("grid_mapping")
    kept = {name: value for name, value in variable.attrs.items() if name not in _ENCODED}
    return {**({"grid_mapping": mapping} if mapping else {}), **kept}


def _nothing(variable: xr.DataArray) -> da.Array:
    """Stand in for pixels, which are never computed."""
    return da.zeros(variable.shape, chunks=-1, dtype=variable.dtype)


def _plain_coordinates(dataset: xr.Dataset) -> xr.Dataset:
    """Drop how coordinates were stored elsewhere; text of fixed width has no place in Zarr v3."""
    coords = {}
    for name, coord in dataset.coords.items():
        if coord.dtype.kind in "UT":
            coord = coord.astype(object)
        coords[name] = coord.variable.copy(deep=False)
        coords[name].encoding = {}
    return dataset.drop_encoding().assign_coords(coords)
