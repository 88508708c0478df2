"""Reference heights are compared with the imagery before anything is learned from them."""

import math
import re

import numpy as np
import odc.geo.xr  # noqa: F401  (registers .odc)
import pytest
import rioxarray

from xchmv2.datasets import synthetic_forest
from xchmv2.training.pairs import read_pair, write_registration

# Private imports: fine_tune reads its pairs by them, and its result tells what was found.


def make_scene(side=128):
    scene = synthetic_forest((side, side), times=("2020-07-01",), seed=8).isel(time=0)
    return scene[["red", "green", "blue"]], scene["canopy_height"]


def test_a_reference_in_place_says_so():
    imagery, height = make_scene()
    found = read_pair(imagery, height).registration
    assert found.known
    assert math.hypot(found.dy, found.dx) < 2.5
    lies = f"{found.dy:.1f} px down and {found.dx:.1f} px to the right of the imagery"
    assert write_registration(found) == f"in place, {lies}"


@pytest.mark.parametrize("crs", [None, "EPSG:3857"])
def test_a_displaced_reference_is_told_and_the_advice_moves_it(crs):
    imagery, height = make_scene(160)
    # 14 px down and 5 px to the left of 0.6 m.
    moved = height.assign_coords(y=height.y - 8.4, x=height.x - 3.0)
    if crs is not None:
        moved = moved.odc.reproject(crs, resolution=0.9, dst_nodata=np.nan)
    with pytest.warns(UserWarning, match="training would blur the model's heights") as told:
        found = read_pair(imagery, moved).registration
    assert abs(found.dy - 14) < 2
    assert abs(found.dx + 5) < 2
    said = write_registration(found)
    assert re.match(r"displaced, 1[2-5]\.\d px down and -[3-6]\.\d px to the right of", said)
    words = next(str(each.message) for each in told if "training" in str(each.message))
    assert re.search(r"lie 1[3456] px down and -[456] px to the right of where the imagery", words)
    reference = moved
    if crs is not None:
        assert "; take reference.odc.reproject(imagery.odc.crs) and move it: " in words
        reference = moved.odc.reproject(imagery.odc.crs)
    corrected = eval(words.split("move it: ")[1], {"reference": reference})
    assert (
        math.hypot(*(getattr(read_pair(imagery, corrected).registration, d) for d in ("dy", "dx")))
        < 3
    )


def test_other_ground_and_small_scenes_cannot_be_told():
    imagery, height = make_scene()
    turned = height.copy(data=np.rot90(height.values))
    assert "check that both show the same ground" in read_pair(imagery, turned).registration.problem
    few = {"y": slice(0, 24), "x": slice(0, 24)}
    found = read_pair(imagery.isel(few), height.isel(few)).registration
    # Not what to pass to align, which fine_tune does not take.
    expected = "cannot be told (24 x 24 px are too few to tell a shift)"
    assert write_registration(found) == expected


@pytest.mark.parametrize("resolution", [0.6, 1.0])
def test_real_lidar_is_found_where_it_lies(data, resolution):
    folder = data / "rgb_chm_bart2019"
    imagery = rioxarray.open_rasterio(folder / "BART_320000_4881000_rgb_2019.tif")
    lidar = rioxarray.open_rasterio(folder / "BART_320000_4881000_chm_2019.tif", masked=True)
    found = read_pair(imagery, lidar, resolution=resolution).registration
    assert math.hypot(found.dy, found.dx) < 2.5
    moved = lidar.assign_coords(y=lidar.y - 8, x=lidar.x + 5)
    with pytest.warns(UserWarning, match="move it: reference.assign_coords"):
        again = read_pair(imagery, moved, resolution=resolution).registration
    assert (again.dy - found.dy) * resolution == pytest.approx(8, abs=1)
    assert (again.dx - found.dx) * resolution == pytest.approx(5, abs=1)
