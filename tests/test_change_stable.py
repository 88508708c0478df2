import numpy as np
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import follow

from xchmv2.change import ComparisonWarning, stable_bias
from xchmv2.errors import CHMv2Error


def pair(*, offset=1.5, spread=2.0, lost=0.2, canopy=0.6, shape=(200, 240), seed=0):
    """Two dates: open ground, canopy that is off by an offset, and clear-cuts."""
    rng = np.random.default_rng(seed)
    cover = rng.random(shape) < canopy
    before = np.where(cover, rng.uniform(8, 30, shape), 0.0)
    after = np.where(cover, before + rng.normal(offset, spread, shape), 0.0)
    after[: int(lost * shape[0])] = 0.0
    coords = {"time": np.array(["2019-07-01", "2024-07-01"], "datetime64[ns]")}
    attrs = {"standard_name": "canopy_height", "units": "m"}
    return xr.DataArray(
        np.stack([before, after]).astype("f4"), coords, ("time", "y", "x"), "canopy_height", attrs
    )


@pytest.mark.parametrize("lost", [0.0, 0.2, 0.3])
def test_offset_and_spread_in_spite_of_loss(lost):
    found = stable_bias(pair(lost=lost), apply=False)
    assert float(found["offset"][1]) == pytest.approx(1.5, abs=0.1)
    assert float(found["nmad"][1]) == pytest.approx(2.0, abs=0.1)
    assert float(found["offset"][0]) == float(found["nmad"][0]) == 0
    assert 0 < int(found["stable_pixels"][1]) <= 0.6 * 200 * 240 * 1.02
    assert found["offset"].attrs["units"] == "m"


def test_a_mask_counts_all_its_pixels():
    heights = pair(lost=0.0, canopy=1.0)
    mask = xr.zeros_like(heights[0], dtype=bool).drop_vars("time")
    mask[50:150, 20:] = True
    found = stable_bias(heights, mask, apply=False)
    change = (heights[1] - heights[0]).values[mask]
    middle = np.median(change)
    assert float(found["offset"][1]) == pytest.approx(middle, abs=0.011)
    nmad = 1.4826 * np.median(np.abs(change - middle))
    assert float(found["nmad"][1]) == pytest.approx(nmad, abs=0.02)
    assert int(found["stable_pixels"][1]) == mask.sum()


def test_the_offset_is_taken_out():
    heights = pair()
    copy = heights.copy(deep=True)
    corrected = stable_bias(heights)
    xr.testing.assert_identical(heights, copy)
    assert float(stable_bias(corrected, apply=False)["offset"][1]) == pytest.approx(0, abs=0.02)
    np.testing.assert_array_equal(corrected[0], heights[0])
    offset = float(corrected["removed_offset"][1])
    np.testing.assert_allclose(corrected[1], heights[1] - offset, atol=1e-5)
    assert corrected.name == "canopy_height"
    assert corrected.dtype == np.float32
    one = stable_bias(heights[1], to=heights[0])
    assert float(one["removed_offset"]) == offset
    dataset = stable_bias(xr.Dataset({"canopy_height": heights, "other": heights * 2}))
    xr.testing.assert_identical(dataset["canopy_height"].drop_attrs(), corrected.drop_attrs())
    np.testing.assert_array_equal(dataset["other"], heights * 2)


def test_what_a_mask_tells_is_taken_out_of_all_pixels():
    heights = pair(lost=0.0)
    heights[1] += np.float32(0.5)
    ground = heights.max("time") < 1
    corrected = stable_bias(heights, ground)
    np.testing.assert_allclose(corrected[1], heights[1] - 0.5, atol=0.01)


@pytest.mark.filterwarnings("ignore:the offset of:xchmv2.change.ComparisonWarning")
@settings(max_examples=4)
@given(rows=st.integers(13, 40), cols=st.integers(16, 48), times=st.integers(1, 2))
def test_lazy_and_the_same_for_any_chunks(rows, cols, times):
    heights = pair(shape=(40, 48))
    heights[1, 5:9] = np.nan
    expected = stable_bias(heights)
    chunked = heights.chunk(time=times, y=rows, x=cols)
    with no_compute():
        corrected = stable_bias(chunked)
        table = stable_bias(chunked, apply=False)
    xr.testing.assert_identical(corrected.compute(), expected)
    xr.testing.assert_identical(table.compute(), stable_bias(heights, apply=False))


def test_open_ground_counts_where_there_is_no_canopy():
    rng = np.random.default_rng(1)
    ground = pair(canopy=0.0, lost=0.0)
    ground[1] = rng.normal(0.2, 0.3, ground[1].shape)
    found = stable_bias(ground, apply=False)
    assert float(found["offset"][1]) == pytest.approx(0.2, abs=0.02)
    assert float(found["nmad"][1]) == pytest.approx(0.3, abs=0.02)


def test_a_date_without_heights_is_told_and_hinders_no_other():
    heights = pair()
    empty = heights[:1].where(False).assign_coords(time=[np.datetime64("2021-07-01", "ns")])
    cube = xr.concat([heights[:1], empty, heights[1:]], "time")
    with pytest.warns(
        ComparisonWarning, match="no heights on 2021-07-01, so their offset is unknown"
    ) as warned:
        found = cube.chmv2.stable_bias()
    assert warned[0].filename == __file__  # not a line of the package
    assert found["removed_offset"].isnull().values.tolist() == [False, True, False]
    xr.testing.assert_equal(found[[0, 2]], stable_bias(heights))
    xr.testing.assert_equal(stable_bias(cube.chunk(y=70)).compute(), found)


def test_bad_input():
    heights = pair()
    with pytest.raises(
        CHMv2Error, match="a boolean DataArray, True on stable ground, found float32"
    ):
        stable_bias(heights, heights[0])
    with pytest.raises(CHMv2Error, match="a mask of dims") as raised:
        stable_bias(heights, heights > 2)
    assert follow(raised, stable=heights > 2).dims == ("y", "x")
    with pytest.raises(CHMv2Error, match="same grid, found"):
        stable_bias(heights, heights[0, 1:] > 2)
    with pytest.raises(
        CHMv2Error, match="no pixel is valid and stable on both dates; pass other dates"
    ):
        stable_bias(heights.where(heights.time < heights.time[1]))
    with pytest.raises(CHMv2Error, match="no pixel is valid and stable on both dates"):
        stable_bias(heights, heights[0] > 1000)
    known = xr.zeros_like(heights[0], dtype=bool).drop_vars("time")
    known[:5] = True
    three = xr.concat([heights, heights[1:].assign_coords(time=heights.time[1:] + 1)], "time")
    three[1, :5] = np.nan
    with pytest.raises(CHMv2Error, match="stable on the reference and on 2024-07-01; pass other"):
        stable_bias(three, known)
    with pytest.raises(CHMv2Error, match="exactly one date, '2020', found none"):
        stable_bias(heights, to="2020")
    with pytest.raises(CHMv2Error, match="pass to=other_height"):
        stable_bias(heights[0])
    empty = stable_bias(heights.where(heights.time < heights.time[1]).chunk(), apply=False)
    assert np.isnan(empty["offset"][1].compute())


@pytest.mark.parametrize(
    ("change", "share", "doubted"),
    [
        (lambda h, rng: h - 12, 0.35, False),
        (lambda h, rng: h - rng.uniform(3, 12, h.shape), 0.2, False),
        (lambda h, rng: rng.uniform(2, 4, h.shape), 0.35, False),
        (lambda h, rng: h - 6, 0.35, True),  # the likely error of its offset is told
    ],
    ids=["thinned by 12 m", "thinned by 3 to 12 m", "cleared", "thinned by 6 m"],
)
def test_the_offset_is_within_a_quarter_of_a_metre_or_doubted(change, share, doubted):
    rng = np.random.default_rng(7)
    truth = rng.uniform(18, 30, (300, 300))
    before, after = (truth + rng.normal(0, 2, truth.shape) for _ in range(2))
    lost = rng.random(truth.shape) < share
    after[lost] = change(after, rng)[lost]
    heights = pair(shape=truth.shape).copy(data=np.stack([before, after + 1.0]).astype("f4"))
    if doubted:
        with pytest.warns(
            ComparisonWarning, match=r"on 2024-07-01 may be wrong by .* pass stable="
        ):
            stable_bias(heights)
        stable = xr.DataArray(~lost, dims=("y", "x"), coords=heights[0].drop_vars("time").coords)
        found = stable_bias(heights, stable, apply=False)
    else:
        found = stable_bias(heights, apply=False)
    assert float(found["offset"][1]) == pytest.approx(1.0, abs=0.25)
    assert float(found["offset_doubt"][1]) < 0.25
