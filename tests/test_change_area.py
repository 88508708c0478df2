import numpy as np
import pytest
import scipy.stats
import xarray as xr
from conftest import no_compute
from reference import follow
from scipy import ndimage

from xchmv2.change import correlation_length, difference, loss, loss_area
from xchmv2.change.correlation import independent_area
from xchmv2.errors import CHMv2Error

# Private imports: the formula alone is held against a plain sum.


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
    assert correlation_length(change) == pytest.approx(2 * width * 0.6, rel=0.15)
    lazy = change.chunk(y=90, x=130)
    assert correlation_length(lazy) == correlation_length(change)


def test_white_noise_has_the_length_of_a_pixel():
    field = xr.DataArray(np.random.default_rng(0).normal(size=(300, 300)), dims=("y", "x"))
    assert correlation_length(field) == pytest.approx(np.sqrt(1 / np.pi), rel=0.1)
    assert np.isnan(correlation_length(field * np.nan))


def test_independent_area():
    assert independent_area(0.36, None) == 0.36
    assert independent_area(0.36, 10.0) == pytest.approx(314.16, abs=0.01)


def test_the_interval_holds_the_truth():
    inside, errors = [], []
    for seed in range(0, 40, 2):
        change = difference(*forest(4, sd=3.0, seed=seed), correlation_length=4.8)
        found = loss_area(change)
        true = 100 * 80 * 0.36
        inside.append(bool(found["lower"] <= true <= found["upper"]))
        errors.append(float(found["area"]) - true)
    assert np.mean(inside) >= 0.9
    assert abs(np.mean(errors)) < 0.02 * true


def test_area_is_that_of_the_mask_and_longer_errors_widen():
    change = difference(*forest(4, sd=3.0))
    short, long = (loss_area(change, correlation_length=length) for length in (2.0, 20.0))
    expected = float(loss(change, threshold=5).sum()) * 0.36
    assert float(short["area"]) == pytest.approx(expected)
    assert float(long["standard_error"]) == pytest.approx(10 * float(short["standard_error"]))
    assert "units" not in short["area"].attrs
    placed = loss_area(change.odc.assign_crs(32633), correlation_length=2.0)
    assert placed["area"].attrs["units"] == "m2"
    assert float(placed["area"]) == pytest.approx(expected, rel=2e-3)
    narrow = loss_area(change, correlation_length=2.0, confidence=0.5)
    assert float(narrow["upper"] - narrow["lower"]) < float(short["upper"] - short["lower"])


def test_the_rim_counts_what_errors_may_have_hidden():
    change = difference(*forest(4, sd=3.0), sigma=3.0, correlation_length=0.0)
    found = loss_area(change, threshold=5, confidence=0.001)  # no standard errors: the rim alone
    drop = -change["height_change"].values
    sd = change["level_of_detection"].values / 1.959964
    likely = loss(change["height_change"], threshold=5).values
    near = ndimage.distance_transform_cdt(~likely, "chessboard")  # 3 m are 5 px
    rim = scipy.stats.norm.cdf((drop - 5) / sd)[(near > 0) & (near <= 5)].sum() * 0.36
    gained = loss(-change["height_change"], threshold=5).values
    both = max(loss(change, threshold=5).values.sum(), likely.sum() - gained.sum()) * 0.36
    assert rim > 5
    assert float(found["upper"]) == pytest.approx(both + rim, rel=1e-3)
    water = xr.ones_like(change["significant"])  # all of it left out
    none = loss_area(change, mask=water)
    assert float(none["upper"]) == 0


def test_lazy_and_the_same_for_any_chunks():
    change = difference(*forest(4), sigma=2, correlation_length=5)
    with no_compute():
        lazy = loss_area(change.chunk(y=130, x=170))
    xr.testing.assert_allclose(lazy.compute(), loss_area(change))


def test_labels():
    found = loss_area(difference(*forest(4), sigma=2, correlation_length=5))
    assert found.attrs == {"threshold": 5.0, "confidence": 0.95, "correlation_length": 5.0}
    for layer in found.values():
        assert set(layer.attrs) <= {"long_name", "units"}
        assert not layer.coords


def test_bad_input():
    change = difference(*forest(4), sigma=2)
    with pytest.raises(CHMv2Error, match="interval of an area needs the correlation length"):
        loss_area(change)
    with pytest.raises(CHMv2Error, match="at least 0 m, found correlation_length=-3"):
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
