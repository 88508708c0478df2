import numpy as np
import pytest
import xarray as xr
from conftest import no_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import follow
from scipy import ndimage, stats

from xchmv2.change import correlation_length, difference, loss_area
from xchmv2.change import gross_change as engine
from xchmv2.change.gross_change import (
    _LEVELS,
    DIFFERENCES,
    PixelErrors,
    count_differences,
    gross_change,
    own_shape,
    pair_shares,
    read_counts,
)
from xchmv2.errors import CHMv2Error

# Private imports: formulas alone are held against plain sums, and statistics against simulations.


def noise(width, shape=(400, 400), seed=0):
    field = ndimage.gaussian_filter(
        np.random.default_rng(seed).normal(size=shape), width, mode="wrap"
    )
    return field / field.std()


def forest(width, *, sd=2.0, cut=(100, 80), seed=0, pixel=0.6):
    """Two dates of a forest 20 m high, with one clear-cut and errors of some width [px]."""
    coords = {"y": 5e6 - pixel * np.arange(400), "x": 5e5 + pixel * np.arange(400)}
    first, second = (
        xr.DataArray(20 + sd * noise(width, seed=seed + k), coords, ("y", "x")) for k in range(2)
    )
    second[50 : 50 + cut[0], 60 : 60 + cut[1]] = 1.0
    return first, second


@pytest.mark.parametrize("width", [3.0, 5.0])
def test_the_length_of_known_noise(width):
    # White noise smoothed by a Gaussian of width s has the correlation exp(-r2 / 4 s2), whose
    # integral is 4 pi s2: a disc of radius 2 s.
    change = difference(*forest(width), sigma=2)
    # The errors of smooth noise are told by spherical functions, which reach somewhat farther.
    assert 0.85 < correlation_length(change) / (2 * width * 0.6) < 1.5
    lazy = change.chunk(y=90, x=130)
    assert correlation_length(lazy) == correlation_length(change)


def test_white_noise_has_the_length_of_a_pixel():
    field = xr.DataArray(np.random.default_rng(0).normal(size=(300, 300)), dims=("y", "x"))
    assert correlation_length(field) == pytest.approx(np.sqrt(1 / np.pi), rel=0.1)
    assert np.isnan(correlation_length(field * np.nan))


def test_the_interval_holds_the_truth_and_the_map_is_not_asked():
    true = 100 * 80 * 0.36
    inside, errors = [], []
    for seed in range(0, 20, 2):
        change = difference(*forest(4, sd=3.0, seed=seed), sigma=3.0, correlation_length=4.8)
        found = loss_area(change)
        inside.append(bool(found["lower"] <= true <= found["upper"]))
        errors.append(float(found["area"]) - true)
    assert np.mean(inside) >= 0.9
    assert abs(np.mean(errors)) < 0.1 * true
    volume = float((change["height_change"] * -0.36).where(change["height_change"] < -15).sum())
    assert found["volume_lower"] <= volume <= found["volume_upper"]
    without = change.drop_vars(["significant", "z_score", "p_value"])
    xr.testing.assert_identical(loss_area(without), found)


@pytest.mark.parametrize("width", [0.0, 4.0])
@pytest.mark.parametrize("sd", [1.0, 4.0])
def test_nothing_lost_is_possible_and_a_true_loss_is_never_denied(width, sd):
    shape, held = (250, 250), []
    for seed in range(4, 10, 2):
        errors = [sd * noise(width, shape, seed + k) for k in range(2)]
        for lost in (0, 22):  # 22 x 22 px, 174 m2
            before, after = (
                xr.DataArray(45 + error, forest(1)[0][:250, :250].coords, ("y", "x"))
                for error in errors
            )
            after[90 : 90 + lost, 90 : 90 + lost] -= 23
            change = difference(before, after, sigma=sd, correlation_length=2 * width * 0.6)
            found = loss_area(change)
            held.append(bool(found["lower"] <= lost**2 * 0.36 <= found["upper"]))
            assert not lost or float(found["upper"]) > lost**2 * 0.2
    assert np.mean(held) >= 0.8  # of 6


def test_longer_errors_widen_and_less_confidence_narrows():
    change = difference(*forest(4, sd=3.0), sigma=3.0)
    width = [
        float(found["upper"] - found["lower"])
        for found in (
            loss_area(change, correlation_length=20.0),
            loss_area(change, correlation_length=2.0),
            loss_area(change, correlation_length=2.0, confidence=0.5),
        )
    ]
    assert width[0] > 2 * width[1] > 3 * width[2]
    found = loss_area(change, correlation_length=2.0, confidence=0.5)
    half = float(found["standard_error"]) * stats.norm.ppf(0.75)
    assert 2 * half == pytest.approx(width[2])


def test_true_areas_and_units():
    change = difference(*forest(4, sd=1.0), sigma=1.0, correlation_length=2.0)
    plain, placed = loss_area(change), loss_area(change.odc.assign_crs(32633))
    assert "units" not in plain["area"].attrs
    assert (placed["area"].attrs["units"], placed["volume"].attrs["units"]) == ("m2", "m3")
    assert float(placed["area"]) == pytest.approx(float(plain["area"]), rel=2e-3)
    # In degrees, rows near the pole are narrower: only those of the clear-cut count.
    degrees = {"y": 70 + 0.02 * np.arange(400), "x": 10 + 1e-4 * np.arange(400)}
    polar = change.drop_vars(["x", "y"]).assign_coords(degrees).odc.assign_crs(4326)
    cells = polar.odc.geobox
    assert cells.crs.geographic
    found = loss_area(polar, correlation_length=0.0)
    from xchmv2.raster import cell_areas

    true = float(cell_areas(polar["height_change"])[50:150, 60:140].sum())
    assert float(found["area"]) == pytest.approx(true, rel=0.02)


def test_a_mask_leaves_out_and_no_pixels_are_no_area():
    change = difference(*forest(4, sd=1.0), sigma=1.0, correlation_length=2.0)
    water = xr.zeros_like(change["significant"])
    water[40:160, 50:100] = True
    half = loss_area(change, mask=water)
    assert float(half["area"]) == pytest.approx(100 * 40 * 0.36, rel=0.01)
    assert all(np.isnan(value) for value in loss_area(change, mask=~(water & False)).values())
    unknown = change.assign(level_of_detection=change["level_of_detection"].where(~water))
    xr.testing.assert_identical(loss_area(unknown), half)


def test_lazy_and_the_same_for_any_chunks():
    change = difference(*forest(4), sigma=2, correlation_length=5)
    given, before = change.copy(deep=True), loss_area(change)
    xr.testing.assert_identical(change, given)
    mask = xr.zeros_like(change["significant"])
    with no_compute():
        lazy = [loss_area(change.chunk(y=y, x=x)) for y, x in ((130, 170), (130, 170), (400, 7))]
        masked = loss_area(change.chunk(y=90), mask=mask)
    assert lazy[0]["area"].data.name == lazy[1]["area"].data.name
    for other in (*lazy, masked):
        xr.testing.assert_identical(other.compute(), before)


def test_labels():
    found = loss_area(difference(*forest(4), sigma=2, correlation_length=5))
    assert found.attrs == {"threshold": 5.0, "confidence": 0.95}
    assert list(found) == [
        "area", "standard_error", "lower", "upper", "volume", "volume_standard_error",
        "volume_lower", "volume_upper", "misfit",
    ]  # fmt: skip
    for layer in found.values():
        assert set(layer.attrs) <= {"long_name", "units"}
        assert not layer.coords


def test_counts_add_up():
    rng = np.random.default_rng(0)
    change, sd = rng.normal(0, 20, (90, 70)), rng.uniform(0.1, 40, (90, 70))
    change[::7], sd[3], area = np.nan, np.nan, rng.uniform(0.5, 1, (90, 70))
    whole = count_differences(change, sd, area)
    parts = [count_differences(change[k::4], sd[k::4], area[k::4]) for k in range(4)]
    assert (sum(parts) == whole).all()
    known = np.isfinite(change) & np.isfinite(sd)
    sds, counts, pixels = read_counts(whole)
    assert pixels == known.sum()
    assert counts.sum() == pytest.approx(area[known].sum(), rel=1e-6)
    mean = (counts.sum(axis=0) @ DIFFERENCES) / counts.sum()
    assert mean == pytest.approx((area * change)[known].sum() / area[known].sum(), abs=0.05)
    one = read_counts(count_differences(change, np.float64(3.3)))[0]
    assert one == pytest.approx([3.3], rel=2e-4)
    assert sds.min() < 0.25 < 32 < sds.max()


def spherical(distance, reach=20.0):
    near = np.minimum(distance / reach, 1)
    return 1 - 1.5 * near + 0.5 * near**3


def test_pairs_of_pixels():
    side = 120
    covered = np.ones((side, side))
    covered[30:70, 50:80] = 0  # a hole
    alike = pair_shares(spherical, covered, (1.0, 1.0), 1.0)
    rows, columns = np.nonzero(covered)
    chosen = np.random.default_rng(0).choice(len(rows), 300, replace=False)
    apart = np.hypot(rows[chosen, None] - rows, columns[chosen, None] - columns)
    rho = np.where(apart > 0, spherical(apart), 0.0)
    found = PixelErrors(np.ones(1), len(rows), alike).mean_correlation
    assert found == pytest.approx(rho.mean(), rel=0.03)
    assert alike[10] == pytest.approx((rho > _LEVELS[10]).mean(), rel=0.15)
    coarse = pair_shares(spherical, covered.reshape(40, 3, 40, 3).mean((1, 3)), (3.0, 3.0), 1.0)
    assert coarse == pytest.approx(alike, abs=0.03 * alike[0])
    assert (pair_shares(lambda d: 0 * d, covered, (1.0, 1.0), 1.0) == 0).all()


def test_the_covariance_of_counts():
    # The errors of pairs are correlated by anything between 0 and 1, alike often.
    apart = np.append(engine._EDGES, 0.0) - engine._INSIDE[:, None]
    single, pairs = engine._covariances(apart.tobytes())
    found = np.tensordot(1 - _LEVELS, pairs, 1)
    change = engine._INSIDE[14]
    edges = engine._EDGES[[8, 12, 15]] - change
    rhos = (np.arange(40) + 0.5) / 40
    for i, u in zip((8, 12, 15), edges, strict=True):
        for j, v in zip((8, 12, 15), edges, strict=True):
            joint = [
                stats.multivariate_normal.cdf([u, v], cov=[[1, rho], [rho, 1]]) for rho in rhos
            ]
            expected = np.mean(joint) - stats.norm.cdf(u) * stats.norm.cdf(v)
            assert found[14, i, j] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    rng = np.random.default_rng(0)
    rho, first, other = rng.uniform(size=10**6), *rng.normal(size=(2, 10**6))
    second = rho * first + np.sqrt(1 - rho**2) * other
    depth = [np.maximum(-change - error, 0) for error in (first, second)]
    assert found[14, -1, -1] == pytest.approx(np.cov(*depth)[0, 1], rel=0.02)
    below = (second < edges[1]).astype(float)
    assert found[14, -1, 12] == pytest.approx(np.cov(depth[0], below)[0, 1], rel=0.02)
    assert single[14, -1, -1] == pytest.approx(np.var(depth[0]), rel=0.02)
    assert single[14, -1, 12] == pytest.approx(
        np.cov(depth[0], (first < edges[1]).astype(float))[0, 1], rel=0.02
    )


def both_sides(counts, differences, errors, **options):
    return [
        gross_change(counts, differences, errors, side=side, **options) for side in ("loss", "gain")
    ]


def flat(found):
    return np.array([*found.area, *found.volume])


def test_gain_is_the_mirror_of_loss_and_units_do_not_matter():
    rng = np.random.default_rng(0)
    change = np.concatenate([rng.normal(0, 3, 9000), rng.normal(-9, 3, 900), rng.normal(7, 1, 500)])
    sd = np.repeat([3.0, 1.0], [9900, 500])
    sds, counts, pixels = read_counts(count_differences(change, sd))
    errors = PixelErrors(sds, pixels, 0.01 * (1 - _LEVELS), 0.05, 0.1)
    loss, gain = both_sides(counts, DIFFERENCES, errors, threshold=5.0)
    mirrored = both_sides(counts[:, ::-1], DIFFERENCES, errors, threshold=5.0)
    assert flat(mirrored[1]) == pytest.approx(flat(loss))
    assert flat(mirrored[0]) == pytest.approx(flat(gain))
    centimetres = PixelErrors(100 * sds, pixels, errors.alike, 0.05, 10.0)
    scaled = both_sides(counts, 100 * DIFFERENCES, centimetres, threshold=500.0)[0]
    assert scaled.area == pytest.approx(loss.area, rel=1e-3)
    assert np.array(scaled.volume) == pytest.approx(100 * np.array(loss.volume), rel=1e-3)
    more = gross_change(1000 * counts, DIFFERENCES, errors, threshold=5.0)
    assert flat(more) == pytest.approx(flat(loss), rel=1e-6)
    truth = [900, 500]
    for found, true in zip((loss, gain), truth, strict=True):
        assert found.area.lower <= true / 10400 <= found.area.upper


@given(
    bins=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, len(DIFFERENCES) - 1), st.integers(1, 10**9)),
        max_size=4,
    ),
    sd=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    correlation=st.sampled_from([0.0, 1e-3, 0.9]),
    threshold=st.sampled_from([0.2, 5.0, 60.0]),
    pixels=st.one_of(st.none(), st.integers(1, 10**9)),
)
@settings(max_examples=25)
def test_any_counts_have_an_interval(bins, sd, correlation, threshold, pixels):
    counts = np.zeros((3, len(DIFFERENCES)))
    for kind, place, size in bins:
        counts[kind, place] += size
    errors = PixelErrors(
        np.sort(sd), pixels or max(counts.sum(), 1), np.where(_LEVELS < 0.9, correlation, 0.0)
    )
    found = gross_change(counts, DIFFERENCES, errors, threshold=threshold)
    if not bins:
        assert np.isnan(flat(found)).all()
        return
    for estimate, error, lower, upper in (found.area, found.volume):
        assert 0 <= lower <= estimate <= upper * (1 + 1e-9) + 1e-9 < np.inf
        assert error >= 0
    assert found.area.upper <= 1 + 1e-9


SIDE = 300
DOWN, ALONG = np.mgrid[:SIDE, :SIDE]
SCENES = ("none", "thinned", "clear 0.05", "clear 0.5", "clear 4", "growth", "loss and gain")
#: sd of one date [m], widths of the smoothing [px] and their shares of the variance.
NOISES = {
    "1 white": (1.0, {0: 1.0}),
    "2.5 white": (2.5, {0: 1.0}),
    "2.5, 3 px": (2.5, {3: 1.0}),
    "4, 3 px": (4.0, {3: 1.0}),
    "4, 10 px": (4.0, {10: 1.0}),
    "2.5, 80 % 5 px, 20 % 150 px": (2.5, {2.5: 0.8, 75: 0.2}),
    "2.5 Laplace": (2.5, {}),
}


def true_change(scene, rng):
    """Change of 9 ha in pixels of 1 m."""
    change = np.full((SIDE, SIDE), 1.5 if scene == "growth" else 0.0)

    def disc(hectares, by):
        reach = np.sqrt(hectares * 1e4 / np.pi)
        row, column = rng.uniform(reach, SIDE - reach, 2)
        inside = np.hypot(DOWN - row, ALONG - column) < reach
        change[inside] = by if np.isscalar(by) else by(inside.sum())

    if scene == "thinned":
        disc(1.0, -7.0)
    if scene.startswith("clear"):
        disc(float(scene.split()[1]), lambda size: -rng.uniform(8, 30, size))
    if scene == "growth":
        [disc(0.1, -21.0) for _ in range(4)]
    if scene == "loss and gain":
        [disc(0.1, by) for by in (-21.0, -15.0, 8.5, 8.5)]
    return change


def draw(noise, rng):
    """Errors of a difference of two dates, and the correlation that they were drawn with."""
    sd, parts = NOISES[noise]
    if not parts:
        return sd * rng.laplace(size=(SIDE, SIDE)), np.zeros(len(_LEVELS))
    errors = np.zeros((SIDE, SIDE))
    for width, share in parts.items():
        field = rng.normal(size=(2 * SIDE, 2 * SIDE))
        if width:
            smooth = ndimage.fourier_gaussian(np.fft.rfft2(field), width, n=2 * SIDE)
            field = np.fft.irfft2(smooth) * 2 * np.sqrt(np.pi) * width
        errors += np.sqrt(2 * share) * sd * field[:SIDE, :SIDE]

    def correlation(distance):
        wide = [(width, share) for width, share in parts.items() if width]
        return sum((s * np.exp(-((distance / w) ** 2) / 4) for w, s in wide), 0 * distance)

    return errors, pair_shares(correlation, np.ones((60, 60)), (5.0, 5.0), 1.0)


def runs(scene, noise, seeds):
    """Simulate; return per seed the errors [m2, m3] and widths, and whether the truth is held."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng([seed, SCENES.index(scene), list(NOISES).index(noise)])
        change, (errors, alike) = true_change(scene, rng), draw(noise, rng)
        lost = np.where(change <= -5, -change, 0.0)
        sd = np.float64(NOISES[noise][0] * np.sqrt(2))
        sds, counts, pixels = read_counts(count_differences(change + errors, sd))
        said = PixelErrors(sds, pixels, alike, 0.03)
        if noise.endswith("Laplace"):
            said = PixelErrors(sds, pixels, alike, 0.03, shape=own_shape(counts, DIFFERENCES, sds))
        result = gross_change(counts, DIFFERENCES, said, threshold=5.0)
        row = []
        for interval, true in ((result.area, (lost > 0).mean()), (result.volume, lost.mean())):
            estimate, _, lower, upper = interval
            held = lower - 1e-4 * true <= true <= upper + 1e-4 * true
            row += [held, SIDE**2 * (estimate - true), SIDE**2 * (upper - lower)]
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize(
    ("scene", "noise"),
    [
        ("none", "4, 3 px"),
        ("thinned", "2.5, 3 px"),
        ("clear 0.05", "4, 10 px"),
        ("clear 0.5", "1 white"),
        ("growth", "2.5 white"),
        ("clear 4", "2.5 Laplace"),
        ("loss and gain", "2.5, 80 % 5 px, 20 % 150 px"),
    ],
)
def test_intervals_hold_in_some_scenes(scene, noise):
    assert runs(scene, noise, range(6))[:, [0, 3]].mean() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("scene", SCENES)
def test_intervals_hold_in_every_scene(scene, noise):
    found = runs(scene, noise, range(100, 200))
    area, volume = found[:, 0].mean(), found[:, 3].mean()
    print(
        f"{scene:14s} {noise:28s} holds {area:.2f} {volume:.2f}, mean error"
        f" {found[:, 1].mean():7.0f} m2, median width {np.median(found[:, 2]):7.0f} m2"
    )
    assert min(area, volume) >= 0.9


def test_bad_input():
    change = difference(*forest(4), sigma=2)
    with pytest.raises(CHMv2Error, match="at least 0 m, or None, found correlation_length=-3"):
        loss_area(change, correlation_length=-3)
    with pytest.raises(CHMv2Error, match="a confidence between 0 and 1"):
        loss_area(change, correlation_length=3, confidence=2)
    with pytest.raises(CHMv2Error, match="a threshold above 0 m"):
        loss_area(change, correlation_length=3, threshold=-2)
    with pytest.raises(CHMv2Error, match="height_change or magnitude, found variables"):
        correlation_length(change[["z_score"]])
    several = change["height_change"].expand_dims("period")
    with pytest.raises(CHMv2Error, match="the change between two dates, found dims") as raised:
        correlation_length(several)
    assert correlation_length(follow(raised, change=several)) == correlation_length(change)
