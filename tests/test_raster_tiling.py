import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from xchmv2.errors import GridError
from xchmv2.raster import TileAxis, tile_runs, validate_grid
from xchmv2.raster.tiling import origin_index

# Private imports: the rounding of the origin shows nowhere else.

axes = st.builds(
    lambda size, tile, share, origin: TileAxis(size, tile * 32, int(share * tile * 32), origin),
    size=st.integers(1, 700),
    tile=st.integers(1, 5),
    share=st.floats(0, 0.5),
    origin=st.integers(-(10**7), 10**7),
)


@given(axes)
def test_starts_are_those_of_the_design(axis):
    expected, window = reference.starts(axis.size, axis.tile, axis.overlap, axis.origin)
    assert list(axis.starts) == expected
    assert axis.window == window


@given(axes)
def test_tiles_stay_inside_and_cover_every_pixel(axis):
    covered = np.zeros(axis.size, int)
    for start, stop in zip(axis.starts, axis.stops, strict=True):
        assert 0 <= start < stop <= axis.size
        assert stop - start == axis.window - axis.padding
        covered[start:stop] += 1
    assert covered.min() >= 1
    np.testing.assert_array_equal(covered, axis.coverage(0, axis.size))
    assert axis.padding < 32


@given(axes)
def test_weights_are_positive_and_sum_to_one(axis):
    total = np.zeros(axis.size)
    for start, stop, weights in zip(axis.starts, axis.stops, axis.weights, strict=True):
        assert weights.min() > 0
        total[start:stop] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)


@given(axes, st.integers(1, 4))
def test_runs_partition_the_tiles_by_the_blocks_they_reach(axis, tiles_per_block):
    block = axis.tile * tiles_per_block
    runs = tile_runs(axis, block)
    assert [i for run in runs for i in range(run.first, run.last + 1)] == list(
        range(len(axis.starts))
    )
    for run in runs:
        assert len(run.blocks) in (1, 2)
        for i in range(run.first, run.last + 1):
            touched = {p // block for p in (axis.starts[i], axis.stops[i] - 1)}
            assert touched == set(run.blocks)
        assert run.total_weight.min() > 0
    assert len({run.blocks for run in runs}) == len(runs)


@given(axes, st.integers(1, 300), st.integers(1, 300))
def test_inner_tiles_do_not_depend_on_the_area_of_interest(axis, before, after):
    """The same ground gets the same tiles and weights, farther than a tile from either edge."""
    wide = TileAxis(axis.size + before + after, axis.tile, axis.overlap, axis.origin - before)
    inner = range(axis.tile, axis.size - axis.tile)
    if not inner:
        return

    def seen(a, shift):
        return {
            p: sorted(
                (start - shift, float(weights[p + shift - start]))
                for start, stop, weights in zip(a.starts, a.stops, a.weights, strict=True)
                if start <= p + shift < stop
            )
            for p in (inner[0], inner[len(inner) // 2], inner[-1])
        }

    narrow_view, wide_view = seen(axis, 0), seen(wide, before)
    for p in narrow_view:
        assert [s for s, _ in narrow_view[p]] == [s for s, _ in wide_view[p]]
        np.testing.assert_allclose(
            [w for _, w in narrow_view[p]], [w for _, w in wide_view[p]], rtol=1e-6
        )


@pytest.mark.parametrize("pixel", [0.6, 0.3, 0.1, -0.6, 0.597])
def test_origin_index_counts_alike_on_centre_anchored_grids(pixel):
    """Half-pixel offsets with floating-point noise must not flip between areas of interest."""
    first = origin_index((812345 + 0.5) * pixel, pixel)
    for steps in range(0, 5000, 7):
        assert origin_index((812345 + 0.5) * pixel + steps * pixel, pixel) == first + steps


@pytest.mark.parametrize(
    ("tile", "overlap", "block", "message"),
    [
        (450, 64, None, r"expected a tile .* multiple of 32 px, found tile=450; .*tile=448"),
        (0, 0, None, r"expected a tile .* found tile=0; .*tile=32"),
        (448, 225, None, r"expected an overlap of 0 to half .*224 px.*overlap=225.*overlap=224"),
        (448, -1, None, r"found overlap=-1 with tile=448"),
        (448, 64, 256, r"expected a block of at least one tile \(448 px\), found block=256"),
    ],
)
def test_bad_grids_are_refused(tile, overlap, block, message):
    with pytest.raises(GridError, match=message):
        validate_grid(tile, overlap, block)


def test_good_grids_pass():
    validate_grid(448, 224, 448)
    validate_grid(32, 0, None)
