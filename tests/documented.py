"""A small project in which the code of README and docs runs: files, items, and names of objects.

Pages speak of `cube`, `height`, `items` or `stands.gpkg` as a user has them. Here all of these are
of one synthetic forest, and the demonstration model stands in for the published one.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import catalogue
import geopandas
import numpy as np
import rioxarray  # noqa: F401  gives .rio
import torch
from shapely.geometry import box

import xchmv2
from xchmv2.datasets import Disturbance, synthetic_forest
from xchmv2.model import CHMv2ForDepthEstimation
from xchmv2.training import fine_tune

ROOT = Path(__file__).parents[1]
SIDE, PIXEL, LEFT, TOP = 240, 0.6, 500_000.0, 5_300_000.0
DATES = ("2019-07-01", "2024-07-10")
#: A block of Python, why it is not run here (or by which other test), and what it prints.
BLOCK = re.compile(
    r"(?:<!-- (?:not run|runnable): (?P<reason>.*?) -->\n)?```python\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<printed>.*?)```)?",
    re.DOTALL,
)


def pages():
    """README and all pages that hold Python."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if blocks(path)]


def blocks(page):
    return list(BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")))


def stand_in(code):
    """Put the demonstration model where a page leaves the published one to be the default."""
    code = code.replace("CHMv2Config()", 'CHMv2Config.from_pretrained("demo")')
    return re.sub(r"\.predict\((?!\"demo\"|model=)", '.predict("demo", ', code)


@functools.cache
def forest():
    """Two dates; a patch is cut between them."""
    cut = Disturbance("clear_cut", "2021-02-10", x=LEFT + 60, y=TOP - 60, area=1_500)
    return synthetic_forest(
        (SIDE, SIDE), times=DATES, seed=11, origin=(LEFT, TOP), disturbances=[cut]
    )


@functools.cache
def predicted():
    """Heights and spread of both dates, in memory."""
    imagery = forest()[["red", "green", "blue"]]
    return imagery.chmv2.predict("demo", layers=("height", "bin_spread")).compute()


def write_items(folder):
    """Write an image and a cloud mask per date, and the STAC items of them."""
    items = []
    for index, time in enumerate(DATES):
        date = forest().isel(time=index)
        values = np.stack([date[band].values for band in ("red", "green", "blue")])
        where = {"origin": (LEFT, TOP), "pixel": PIXEL}
        image = catalogue.raster(folder / f"image-{time}.tif", values, nodata=0, **where)
        clear = np.ones((1, SIDE, SIDE), "uint8")
        mask = catalogue.raster(folder / f"clear-{time}.tif", clear, **where)
        told = {"href": str(mask), "type": catalogue.COG, "raster:bands": [{"data_type": "uint8"}]}
        items.append(
            catalogue.item(
                image,
                id=time,
                time=f"{time}T10:00:00Z",
                properties={"view:sun_elevation": 60.0, "view:off_nadir": 10.0},
                assets={"cloud-mask-raster": told},
                **{
                    "eo:bands": catalogue.names("red", "green", "blue"),
                    "raster:bands": [{"data_type": "uint8", "nodata": 0}] * 3,
                },
            )
        )
    return items


def write_files(folder):
    """Write the files that pages open, in the form that they describe."""
    first = forest().isel(time=0)
    bands = np.stack([first[band].values for band in ("red", "green", "blue")])
    where = {"origin": (LEFT, TOP), "pixel": PIXEL}
    catalogue.raster(folder / "image.tif", bands, **where)
    catalogue.raster(folder / "chm.tif", first["canopy_height"].values[None], nodata=-9999, **where)
    lidar = first["canopy_height"].coarsen(y=2, x=2).mean()
    lidar.rio.to_raster(folder / "lidar_chm.tif")
    away = np.linspace(13, SIDE * PIXEL - 13, 6)
    x, y = (each.ravel() for each in np.meshgrid(LEFT + away, TOP - away))
    points = geopandas.points_from_xy(x, y)
    tall = [
        float(
            first["canopy_height"]
            .sel(x=slice(a - 12, a + 12), y=slice(b + 12, b - 12))
            .quantile(0.98)
        )
        for a, b in zip(x, y, strict=True)
    ]
    columns = {"rh98": tall, "h_canopy": tall}
    shots = geopandas.GeoDataFrame(columns, geometry=points, crs=32633)
    shots.to_file(folder / "gedi.gpkg")
    plots = geopandas.GeoDataFrame(
        {"height": tall, "top_height": tall}, geometry=shots.buffer(10), crs=32633
    )
    plots.to_file(folder / "plots.gpkg")
    half = SIDE * PIXEL / 2
    squares = [
        box(LEFT + i * half, TOP - (j + 1) * half, LEFT + (i + 1) * half, TOP - j * half)
        for j in (0, 1)
        for i in (0, 1)
    ]
    stands = {"name": ["north-west", "north-east", "south-west", "south-east"]}
    geopandas.GeoDataFrame(stands, geometry=squares, crs=32633).to_file(folder / "stands.gpkg")
    _write_sources(folder)


def _write_sources(folder):
    """Write images as their sources deliver them."""
    source(folder / "naip.tif", extra=120)
    source(folder / "visual.tif", pixel=0.305, crs=32617)
    source(folder / "ortho_visual.tif", pixel=0.5, crs=32617)
    source(folder / "ortho_analytic.tif", pixel=0.5, extra=3000, dtype="uint16", factor=10)
    source(folder / "ortho.tif", pixel=0.2, crs=2154)
    source(folder / "odm_orthophoto.tif", pixel=0.05, crs=32617, extra=255, size=192)


def source(path, *, size=96, pixel=0.6, crs=26917, extra=None, dtype="uint8", factor=1):
    """Write a synthetic image, bands first, ``extra`` being a fourth; 255 is an alpha band."""
    image = forest().isel(time=1, y=slice(size), x=slice(size))
    bands = [image[band].values.astype(dtype) * factor for band in ("red", "green", "blue")]
    if extra is not None:
        fourth = np.full((size, size), extra, dtype)
        fourth[:8] = 0
        bands = [np.where(fourth, band, 0) for band in bands] if extra == 255 else bands
        bands.append(fourth)
    values = np.stack(bands).astype(dtype)
    catalogue.raster(path, values, origin=(400_000.0, 3_290_000.0), pixel=pixel, crs=crs)


def write_original(folder):
    """Write the demonstration model as the authors publish theirs: two files, names of their own.

    The names are those that the conversion script of transformers expects.
    """
    backbone, head = {}, {}
    tensors = CHMv2ForDepthEstimation.from_pretrained("demo").state_dict()
    layers = "backbone.model.layer."
    of_block = {
        "attention.o_proj": "attn.proj",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
    }
    of_block |= {f"layer_scale{i}.lambda1": f"ls{i}.gamma" for i in (1, 2)}
    for name, tensor in tensors.items():
        if name.startswith("head."):
            head[_original_name(name)] = tensor
        elif not name.startswith(layers):
            short = name.removeprefix("backbone.").removeprefix("embeddings.")
            short = short.replace("patch_embeddings", "patch_embed.proj")
            backbone[short.replace("register_tokens", "storage_tokens")] = tensor
        elif "q_proj" in name:
            index, kind = name.removeprefix(layers).split(".")[0], name.rpartition(".")[2]
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            backbone[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            short = name.replace(layers, "blocks.")
            for ours, theirs in of_block.items():
                short = short.replace(ours, theirs)
            backbone[short] = tensor
    backbone["mask_token"] = backbone["mask_token"][0]
    size = backbone["cls_token"].shape[-1]
    backbone |= {f"local_cls_norm.{kind}": torch.ones(size) for kind in ("weight", "bias")}
    backbone["rope_embed.periods"] = torch.ones(8)
    backbone["blocks.0.attn.qkv.bias_mask"] = torch.full((3 * size,), torch.nan)
    torch.save(backbone, folder / "backbone.pth")
    torch.save(head, folder / "dpt_head.pth")


def _original_name(name):
    *_, layer, part, kind = name.split(".")
    if "reassemble_stage.layers" in name:
        original = {"projection": f"projects.{layer}.conv", "resize": f"resize_layers.{layer}"}
        return f"reassemble_blocks.{original[part]}.{kind}"
    name = name.removeprefix("head.").replace("reassemble_stage", "reassemble_blocks")
    name = name.replace("fusion_layers", "fusion_blocks").replace("projection.", "project.conv.")
    name = name.replace("residual_layer", "res_conv_unit")
    name = re.sub(r"convolution(\d)\.", r"conv\1.conv.", name)
    return re.sub(r"^convs\.(\d)\.", r"convs.\1.conv.", name)


def names(folder):
    """The objects that pages take as given."""
    heights = predicted()["canopy_height"]
    first, last = (heights.isel(time=k, drop=True) for k in (0, 1))
    items = write_items(folder)
    shots = geopandas.read_file(folder / "gedi.gpkg")
    return {
        "xchmv2": xchmv2,
        "items": items,
        "bbox": tuple(items[0]["bbox"]),
        "cube": xchmv2.load(items, bbox=items[0]["bbox"], chunks=120),
        "layers": predicted(),
        "height": heights,
        "before": first,
        "after": last,
        "icesat": shots,
        "shots": shots,
        "plots": geopandas.read_file(folder / "plots.gpkg"),
    }


def prepare(page, folder):
    """Write all that a page needs and return the names that it takes as given."""
    write_files(folder)
    text = "".join(block["code"] for block in blocks(page))
    if "torch.load" in text:
        write_original(folder)
    if 'open_zarr("canopy.zarr")' in text and 'to_zarr("canopy.zarr")' not in text:
        predicted().chmv2.to_zarr(folder / "canopy.zarr", progress=False)
    return names(folder)


def quick_fine_tune(*args, **options):
    """Train for one short epoch from the demonstration model."""
    quick = {"model": "demo", "epochs": 1, "tile": 96, "batch_size": 4, "validation": 0}
    return fine_tune(*args, **{**quick, **options})
