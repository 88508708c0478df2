"""STAC items over real and made-up image files, in the ways such items are really published."""

from __future__ import annotations

import copy
import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pystac
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds, transform_geom

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
NAIP = "naip_rgbn/naip_m_3211605_ne_11_060_20200415.tif"
BART = "rgb_chm_bart2019/BART_320000_4881000_rgb_2019.tif"
SJER = "sjer052_two_dates/SJER_052_rgb_{}.tif"

RGBN = ("red", "green", "blue", "nir")


def names(*common):
    """``eo:bands`` of these common names."""
    return [{"name": f"B{i}", "common_name": name} for i, name in enumerate(common, start=1)]


def item(
    path,
    *,
    id="one",
    time="2020-07-01T10:00:00Z",
    collection="images",
    properties=None,
    projection=True,
    href=None,
    asset="image",
    assets=None,
    **fields,
):
    """A STAC item, as a dict, over one file; ``fields`` are further metadata of its asset."""
    with rasterio.open(path) as file:
        bounds = transform_bounds(file.crs, "EPSG:4326", *file.bounds) if file.crs else None
        ring = [
            (file.bounds.left, file.bounds.bottom),
            (file.bounds.right, file.bounds.bottom),
            (file.bounds.right, file.bounds.top),
            (file.bounds.left, file.bounds.top),
        ]
        outline = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        geometry = transform_geom(file.crs, "EPSG:4326", outline) if file.crs else None
        grid = {
            "proj:epsg": file.crs.to_epsg() if file.crs else None,
            "proj:shape": list(file.shape),
            "proj:transform": list(file.transform),
        }
    told = {"href": str(href or path), "type": COG, "roles": ["data"], **fields}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "id": id,
        "collection": collection,
        "geometry": json.loads(json.dumps(geometry)),
        **({"bbox": list(bounds)} if bounds else {}),
        "properties": {
            "datetime": time,
            **(grid if projection else {}),
            **(properties or {}),
        },
        "links": [],
        "assets": {asset: told, **(assets or {})},
    }


def raster(path, values, *, origin=(500_000.0, 5_000_000.0), pixel=0.6, crs=32633, nodata=None):
    """Write (band, y, x) values as a GeoTIFF; returns its path."""
    values = np.asarray(values)
    bands, rows, cols = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=cols,
        height=rows,
        count=bands,
        dtype=values.dtype,
        crs=crs,
        transform=from_origin(*origin, pixel, pixel),
        nodata=nodata,
    ) as file:
        file.write(values)
    return path


def noise(bands=3, shape=(64, 80), *, seed=0, dtype="uint8", low=1, high=255):
    """Random values that are neither 0 nor 255."""
    return np.random.default_rng(seed).integers(low, high, (bands, *shape)).astype(dtype)


def published_naip(data, href, count=1):
    """The Planetary Computer's own NAIP items, laid over the NAIP crop that is at hand."""
    with rasterio.open(data / NAIP) as file:
        fresh = item(data / NAIP)
        grid = {"proj:shape": list(file.shape), "proj:transform": list(file.transform)}
        grid |= {"proj:epsg": file.crs.to_epsg(), "proj:bbox": list(file.bounds)}
    items = copy.deepcopy(json.loads((data / "stac/naip-pc.json").read_text())[:count])
    for found in items:
        found.update(geometry=fresh["geometry"], bbox=fresh["bbox"])
        found["properties"].update(grid)
        found["assets"]["image"]["href"] = href
    return items


def static_catalogue(data, folder):
    """Copy images into a folder and write a self-contained static catalogue of them."""
    images = folder / "images"
    images.mkdir(parents=True)
    for name in (NAIP, BART, SJER.format(2017), SJER.format(2018)):
        shutil.copy(data / name, images)
    root = pystac.Catalog("forests", "real imagery")
    neon = _collection("neon")
    root.add_children([neon, _collection("naip")])
    for year in (2017, 2018):
        name = SJER.format(year)
        content = item(
            data / name,
            id=f"SJER_052_{year}",
            time=f"{year}-03-2{year % 10}T19:00:00Z",
            collection="neon",
            properties={"view:sun_elevation": year - 1975.0, "platform": "neon-aop"},
            href=images / name.split("/")[1],
            asset="rgb",
            **{"bands": [{"name": c, "eo:common_name": c} for c in RGBN[:3]], "data_type": "uint8"},
        )
        neon.add_item(pystac.Item.from_dict(content))
    content = item(data / BART, id="BART_2019", time="2019-08-25T15:00:00Z", collection="neon")
    content["assets"]["image"].update(href=str(images / BART.split("/")[1]), roles=["visual"])
    neon.add_item(pystac.Item.from_dict(content))
    for content in published_naip(data, str(images / NAIP.split("/")[1])):
        content["links"] = []
        root.get_child("naip").add_item(pystac.Item.from_dict(content))
    root.normalize_hrefs(str(folder))
    root.make_all_asset_hrefs_relative()
    root.save(pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def _collection(name):
    start = datetime(2017, 1, 1, tzinfo=UTC)
    extent = pystac.Extent(
        pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[start, None]])
    )
    return pystac.Collection(name, f"imagery of {name}", extent)
