"""Which band is red, which values are black and white, which pixels are nodata."""

import re

import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from conftest import cube, no_compute

import xchmv2
from xchmv2.errors import CHMv2Error, ImageryError
from xchmv2.imagery import (
    looks_exchanged,
    propose_value_range,
    read_colour,
    resolve_value_range,
    take_pixels,
)
from xchmv2.imagery.bands import select_bands
from xchmv2.raster import ValidPixels, read_heights, resolve_nodata

# Private imports: select_bands shows what predict() reads.

FAST = {"tile": 64, "overlap": 16}
ASK = r"pass bands= with the (names|numbers) of red, green and blue in that order"


def picture(n=3, labels=None, seed=0, shape=(40, 50), **attrs):
    """An array of n bands on a grid, numbered from 1 as rioxarray does."""
    grid = cube(shape, seed=seed)["red"]
    values = np.random.default_rng(seed).integers(1, 256, (n, *shape)).astype("uint8")
    band = np.arange(1, n + 1) if labels is None else labels
    found = grid.expand_dims(band=band).copy(data=values).rename(None)
    return found.assign_attrs(attrs)


def variables(**attrs):
    """Red, green and blue as variables; ``attrs`` are attributes of each, in that order."""
    found = cube((40, 50))
    for name, values in attrs.items():
        for colour, value in zip(("red", "green", "blue"), values, strict=True):
            found[colour].attrs[name] = value
    return found


def chosen(imagery, bands=None):
    return tuple(band.label for band in select_bands(imagery, bands))


def refusal(function, *args, **options):
    with pytest.raises(CHMv2Error) as caught:
        function(*args, **options)
    return str(caught.value)


class TestReadColour:
    @pytest.mark.parametrize(
        ("text", "meaning"),
        [
            *[(text, "red") for text in ("red", "R", "Red_1", "Band 1: Red", "Red (665 nm)")],
            *[(text, "red") for text in ("sr_red", "RED band", "Band 4 - Red - 10m", "red light")],
            *[(text, "blue") for text in ("b", "Blue", "Blue - 10m", "ortho_blue")],
            *[(text, "other") for text in ("red_edge", "RedEdge", "Vegetation red edge 1")],
            *[(text, "other") for text in ("infra-red", "near infrared", "nir08", "alpha", "CIR")],
            *[(text, "other") for text in ("Coastal Blue", "coastal", "swir16", "pan")],
            *[(text, "") for text in ("", "Band 3", "band_1", "2", "Gray", "undefined")],
            *[(text, None) for text in ("B4", "B04", "SR_B4", "mosaic_red", "green_i", "RGB")],
            *[(text, None) for text in ("redness", "red minus green", "red_2019_final", "visual")],
        ],
    )
    def test_what_a_name_means(self, text, meaning):
        assert read_colour(text) == meaning


class TestBandsAlongADimension:
    @pytest.mark.parametrize(
        ("attrs", "expected"),
        [
            ({}, (1, 2, 3)),
            ({"long_name": "orthophoto of 2019"}, (1, 2, 3)),
            ({"long_name": ("Band 1", "Band 2", "Band 3")}, (1, 2, 3)),
            ({"long_name": ("", None, "")}, (1, 2, 3)),
            ({"long_name": ("blue", "green", "red")}, (3, 2, 1)),
            ({"long_name": np.array(["Band 1: Blue", "Band 2: Green", "Band 3: Red"])}, (3, 2, 1)),
            ({"description": ["Blue_1", "Green_1", "Red_1"]}, (3, 2, 1)),
            ({"long_name": "Blue/Green/Red"}, (3, 2, 1)),
        ],
    )
    def test_descriptions_come_before_numbers(self, attrs, expected):
        assert chosen(picture(**attrs)) == expected

    def test_reversed_descriptions_give_the_colours_they_name(self, tiny_checkpoint):
        rgb = picture()
        bgr = rgb.isel(band=[2, 1, 0]).assign_coords(band=[1, 2, 3])
        bgr.attrs["long_name"] = ("blue", "green", "red")
        found, expected = (i.chmv2.predict(tiny_checkpoint, **FAST) for i in (bgr, rgb))
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        "imagery",
        [
            picture(long_name=("nir", "red", "green")),
            picture(long_name=("B4", "B3", "B2")),
            picture(long_name="B4/B3/B2"),
            picture(long_name="CIR 2019"),
            picture(long_name=("Band 3", "Band 2", "Band 1")),
            picture(long_name=("red", "green")),
            picture(labels=["B04", "B03", "B02"]),
            picture(4, ["B01", "B02", "B03", "B04"]),
            picture(4, ["B02", "B03", "B04", "B08"]),
            picture(4),
            picture(labels=[3, 2, 1]),
            picture(labels=[0, 1, 2]),
        ],
    )
    def test_what_is_not_told_is_asked_without_an_order(self, imagery):
        told = refusal(select_bands, imagery)
        assert re.search(ASK, told)
        assert ".predict(" not in told

    def test_numbers_count_in_the_order_of_the_file(self):
        """Selecting bands leaves the tuple of descriptions as it was."""
        image = picture(4, long_name=("NIR", "Blue", "Green", "Red"))
        assert chosen(image.isel(band=[1, 2, 3])) == (4, 3, 2)
        assert chosen(picture(long_name=("Red", "Green", "Blue")).isel(band=[2, 1, 0])) == (1, 2, 3)
        planet = picture(4, long_name=("Blue", "Green", "Red", "NIR"))
        assert chosen(planet.isel(band=[0, 1, 2])) == (3, 2, 1)

    @pytest.mark.parametrize("source", ["common_name", "colorinterp"])
    def test_what_is_declared_along_the_bands(self, source):
        declared = {source: ("band", ["blue", "green", "red", "alpha"])}
        assert chosen(picture(4).assign_coords(declared)) == (3, 2, 1)
        labelled = picture(4, ["B1", "B2", "B3", "B4"]).assign_coords(declared)
        assert chosen(labelled) == ("B3", "B2", "B1")

    def test_contradictions_show_both_sides(self):
        image = picture(long_name=("Blue", "Green", "Red"))
        image = image.assign_coords(colorinterp=("band", ["red", "green", "blue"]))
        told = refusal(select_bands, image)
        assert "expected metadata that agree which band is red, green and blue" in told
        assert "1 (colorinterp 'red', long_name 'Blue'); 3 (colorinterp 'blue'" in told
        assert re.search(ASK, told)
        assert chosen(image, (3, 2, 1)) == (3, 2, 1)
        with pytest.raises(ImageryError, match=r"'green' \(common_name 'red'\)"):
            select_bands(
                picture(labels=["green", "red", "blue"]).assign_coords(
                    common_name=("band", ["red", "green", "blue"])
                )
            )

    def test_equal_labels(self):
        told = refusal(select_bands, picture(labels=[1, 1, 1]))
        assert told.endswith("imagery.assign_coords(band=range(1, imagery.sizes['band'] + 1))")
        imagery = picture(labels=[1, 1, 1])
        assert chosen(eval(told.partition("number them: ")[2])) == (1, 2, 3)
        assert "number them" in refusal(select_bands, imagery, (1, 1, 1))

    def test_names_among_other_words_are_suggested(self):
        image = picture(4, ["mosaic_blue", "mosaic_green", "mosaic_red", "mosaic_rededge"])
        told = refusal(select_bands, image)
        bands = eval(re.search(r"bands=(\(.*?\))", told)[1])
        assert bands == ("mosaic_red", "mosaic_green", "mosaic_blue")
        assert chosen(image, bands) == bands

    def test_a_dimension_of_another_name(self):
        imagery = picture().rename(band="wavelength")
        told = refusal(select_bands, imagery)
        assert "name the dimension: imagery.rename({'wavelength': 'band'})" in told
        assert chosen(eval(told.partition("dimension: ")[2])) == (1, 2, 3)
        assert "give imagery with three bands" in refusal(select_bands, picture()[0])


class TestVariables:
    def test_what_arithmetic_handed_on_is_no_second_colour(self):
        imagery = variables(common_name=("red", "green", "blue"))
        with xr.set_options(keep_attrs=True):
            imagery["shadow"] = imagery.blue < 30
            imagery["brightness"] = imagery.blue * 2.0
            imagery["ndvi"] = imagery.red / 2
        assert imagery["brightness"].attrs["common_name"] == "blue"
        assert chosen(imagery) == ("red", "green", "blue")

    def test_two_of_which_neither_is_named_so(self):
        imagery = variables(common_name=("red", "green", "blue")).rename(
            red="a", green="b", blue="c"
        )
        imagery["d"] = imagery.a
        told = refusal(select_bands, imagery)
        assert "2 for red: ['a', 'd']; choose: .predict(..., bands=('a', 'b', 'c'))" in told
        assert chosen(imagery, ("a", "b", "c")) == ("a", "b", "c")

    def test_names_that_contradict_common_names(self):
        told = refusal(select_bands, variables(common_name=("blue", "green", "red")))
        assert "'red' (common_name 'blue'); 'blue' (common_name 'red')" in told
        assert chosen(variables(common_name=("blue", "green", "red")), ("red", "green", "blue"))

    def test_other_variables_of_bands_are_not_the_picture(self, tiny_checkpoint):
        imagery = variables()
        expected = imagery.chmv2.predict(tiny_checkpoint, **FAST)
        found = imagery.assign(probabilities=picture(seed=9)).chmv2.predict(tiny_checkpoint, **FAST)
        np.testing.assert_array_equal(found, expected)

    def test_two_pictures(self):
        for imagery in (
            variables().assign(rgb=picture(labels=["red", "green", "blue"])),
            xr.Dataset({"rgb": picture(), "other": picture(seed=1)}),
        ):
            told = refusal(select_bands, imagery)
            assert "one picture of red, green and blue" in told
            assert "imagery['rgb'].chmv2.predict()" in told
            assert len(chosen(imagery["rgb"])) == 3

    def test_rasters_of_one_band_each(self, tiny_checkpoint):
        """As three single-band files that rioxarray opened."""
        image = picture()
        names = ("red", "green", "blue")
        single = {n: image.isel(band=[k]).assign_coords(band=[1]) for k, n in enumerate(names)}
        found = xr.Dataset(single).chmv2.predict(tiny_checkpoint, **FAST)
        np.testing.assert_array_equal(found, image.chmv2.predict(tiny_checkpoint, **FAST))

    def test_bands_as_variables_of_a_file(self):
        numbered = variables().rename(red="band_1", green="band_2", blue="band_3")
        assert chosen(numbered) == ("band_1", "band_2", "band_3")
        for name, colour in zip(numbered, ("Blue", "Green", "Red"), strict=True):
            numbered[name].attrs["long_name"] = colour
        assert chosen(numbered) == ("band_3", "band_2", "band_1")

    def test_asked_without_an_order(self):
        told = refusal(select_bands, variables().rename(red="B4", green="B3", blue="B2"))
        assert re.search(ASK, told)

    def test_initials_count_where_nothing_else_does(self):
        assert chosen(variables().rename(red="R", green="g", blue="B")) == ("R", "g", "B")
        lettered = variables(common_name=("blue", "green", "red"))
        assert chosen(lettered.rename(red="a", green="b", blue="c")) == ("c", "b", "a")


class TestBandsGiven:
    @pytest.mark.parametrize(
        "bands", [[3, 2, 1], (3.0, 2.0, 1.0), np.array([3, 2, 1]), xr.DataArray([3, 2, 1])]
    )
    def test_in_any_sequence(self, bands):
        assert chosen(picture(4), bands) == (3, 2, 1)
        assert chosen(picture(4), iter([3, 2, 1])) == (3, 2, 1)

    @pytest.mark.parametrize(
        "bands",
        [1, 2.5, ("red",), "rgb", b"rgb", {1, 2, 3}, {1: 2}, [[1], [2], [3]], (True, 2, 3),
         np.array(3), (1, 2, 2), (1, 2, 5), (None, None, None)],
    )  # fmt: skip
    def test_anything_else_is_a_sentence(self, bands):
        told = refusal(picture(4).chmv2.plan, bands=bands)
        assert "expected three different bands of [1, 2, 3, 4], as red, green, blue, found" in told
        assert re.search(ASK, told)

    @pytest.mark.parametrize("bands", [1, (1, 2, 9), iter([1, 2])])
    def test_of_the_one_picture_in_a_dataset(self, bands):
        imagery = picture(4).to_dataset(name="rgb").assign(mask=picture()[0] * 1.0)
        told = refusal(imagery.chmv2.plan, bands=bands)
        assert "expected three different bands of [1, 2, 3, 4]" in told
        assert chosen(imagery, iter([3, 2, 1])) == (3, 2, 1)

    def test_the_names_are_suggested_where_they_are_known(self):
        told = refusal(select_bands, picture(4, long_name=("Blue", "Green", "Red", "NIR")), "rgb")
        assert "name them: .predict(..., bands=(3, 2, 1))" in told

    def test_they_overrule_names(self):
        assert chosen(variables(), ("blue", "green", "red")) == ("blue", "green", "red")


def scaled(image, step=1):
    values = np.asarray(image)[:, ::step, ::step]
    valid = ~(values == 0).all(axis=0)
    return take_pixels(values, valid, (0,) * 3, (255,) * 3)


class TestOrder:
    FOREST = (0.42, 0.411, 0.296)

    def forest(self, shape=(160, 160), seed=0):
        """Sunlit crowns, and shadow that the sky makes blue."""
        rng = np.random.default_rng(seed)
        light = np.kron(rng.random((20, 20)), np.ones((shape[0] // 20, shape[1] // 20)))
        colour = np.array(self.FOREST)[:, None, None] * (0.4 + light)
        colour[2] += 0.08 * (1 - light)
        noise = rng.normal(0, 0.02, (3, *shape))
        return (255 * (colour + noise).clip(0, 1)).astype("uint8")

    def imagery(self, order=(0, 1, 2)):
        return picture(shape=(160, 160)).copy(data=self.forest()[list(order)])

    def test_forest(self):
        assert not looks_exchanged(scaled(self.forest()))
        assert looks_exchanged(scaled(self.forest()[::-1]))
        assert not looks_exchanged(scaled(self.forest()[::-1], step=4))  # too few pixels

    @pytest.mark.parametrize(
        "colour",
        [(20, 60, 120), (60, 80, 90), (230, 238, 250), (10, 30, 60), (150, 120, 90), (90, 90, 90)],
    )
    @pytest.mark.parametrize(("noise", "glint"), [(3, 0), (3, 0.03)])
    def test_water_snow_and_soil_raise_no_alarm(self, colour, noise, glint):
        rng = np.random.default_rng(1)
        image = np.array(colour)[:, None, None] + rng.normal(0, noise, (3, 150, 150))
        image = np.where(rng.random((150, 150)) < glint, 250, image).clip(0, 255)
        assert not looks_exchanged(scaled(image))

    def test_real_imagery(self, data):
        """No alarm in the true order; in the wrong one wherever the scene is not grey or hazy."""
        caught = []
        for path in sorted(data.rglob("*.tif*")):
            with rasterio.open(path) as file:
                if file.count < 3:
                    continue
                image, step = file.read((1, 2, 3)), max(1, round(0.6 / file.res[0]))
            if file.crs is None:
                step = 6
            height, width = (size // step * step for size in image.shape[1:])
            parts = image[:, :height, :width].reshape(3, height // step, step, -1, step)
            mean = parts.mean(axis=(2, 4))
            assert not looks_exchanged(scaled(mean)), path.name
            for y in range(0, mean.shape[1] - 127, 64):
                for x in range(0, mean.shape[2] - 127, 64):
                    assert not looks_exchanged(scaled(mean[:, y : y + 128, x : x + 128]))
            caught += [path.name] if looks_exchanged(scaled(mean[::-1])) else []
        assert len(caught) >= 6, caught

    @pytest.mark.parametrize("lazy", [True, False])
    def test_plan_and_predict_warn_and_name_the_call(self, lazy, tiny_checkpoint):
        right, wrong = (self.imagery(order) for order in ((0, 1, 2), (2, 1, 0)))
        if lazy:
            right, wrong = right.chunk(y=50), wrong.chunk(y=50)
        planned = right.chmv2.plan(tiny_checkpoint, **FAST)
        expected = right.chmv2.predict(tiny_checkpoint, **FAST).compute()
        with pytest.warns(
            UserWarning, match=r"bands \(1, 2, 3\).*much better as \(3, 2, 1\)"
        ) as said:
            found = wrong.chmv2.plan(tiny_checkpoint, **FAST)
        assert said[0].filename == __file__
        assert found.colour == pytest.approx(planned.colour[::-1], abs=0.01)
        assert "colours     mean red 0.3" in str(found)
        assert "in training red 0.42, green 0.41, blue 0.30" in " ".join(str(found).split())
        with pytest.warns(UserWarning, match="pass bands=") as said:
            changed = wrong.chmv2.predict(tiny_checkpoint, **FAST).compute()
        assert len({str(warning.message) for warning in said}) == 1
        bands = eval(re.search(r"pass bands=(\(.*?\))", str(said[0].message))[1])
        advised = wrong.chmv2.predict(tiny_checkpoint, bands=bands, **FAST).compute()
        np.testing.assert_allclose(advised, expected, atol=5e-4)
        named = wrong.assign_coords(band=["red", "green", "blue"])
        np.testing.assert_array_equal(named.chmv2.predict(tiny_checkpoint, **FAST), changed)

    def test_named_bands_are_not_read_by_plan(self, tiny_checkpoint):
        imagery = self.imagery((2, 1, 0)).chunk()
        named = imagery.assign_coords(band=["red", "green", "blue"])
        with no_compute():
            assert named.chmv2.plan(tiny_checkpoint, **FAST).colour is None
            assert imagery.chmv2.plan(tiny_checkpoint, **FAST).colour is None  # it cannot be read

    def test_keys_stay(self, tiny_checkpoint):
        imagery = self.imagery((2, 1, 0)).chunk()
        one, two = (imagery.chmv2.predict(tiny_checkpoint, **FAST) for _ in range(2))
        assert one.data.name == two.data.name

    def test_a_scene_without_valid_pixels(self, tiny_checkpoint):
        imagery = self.imagery((2, 1, 0)) * np.uint8(0)
        assert imagery.chmv2.plan(tiny_checkpoint, nodata=0, **FAST).colour is None


class TestValueRange:
    def proposals(self):
        base = picture(shape=(160, 160)).astype("float64")
        return [
            ((base * 10).astype("uint16"), (0, 3000)),
            (base.astype("float32") / 255, (0, 1)),
            (base.astype("float32") / 1000, (0, 0.3)),
            (base.astype("float32"), (0, 255)),
            (base + 0.3, (0, 300)),
            ((base * 0.9).astype("float32"), (0, 255)),
            (base.astype("uint16"), (0, 255)),
            ((base * 10 + 2000).astype("uint16"), (2000, 5000)),
            ((base * 10 - 1000).astype("int16"), (-1000, 2000)),
        ]

    def test_it_fits_the_values_and_is_advised(self, tiny_checkpoint):
        for imagery, expected in self.proposals():
            if expected == (0, 300):  # above 255 there is no 8-bit scale
                imagery = imagery.where(imagery < 255, 280.0)
            assert propose_value_range(imagery) == expected
            assert propose_value_range(imagery.chunk()) == expected
            told = refusal(imagery.chmv2.predict, tiny_checkpoint)
            advised = eval(re.search(r"value_range=(\(.*?\))", told)[1])
            assert advised == expected
            assert "use one range for all dates" in told
            height = imagery.chmv2.predict(tiny_checkpoint, value_range=advised, **FAST)
            assert height.notnull().all()

    def test_lazy_imagery_is_not_read_for_a_message(self, tiny_checkpoint):
        imagery = picture().astype("uint16").chunk()
        with no_compute():
            told = refusal(imagery.chmv2.predict, tiny_checkpoint)
        assert "xchmv2.imagery.propose_value_range(imagery)" in told
        assert eval(re.search(r"xchmv2\.imagery\.\w+\(imagery\)", told)[0]) == (0, 255)

    def test_nodata_and_further_bands_do_not_count(self):
        base = (picture(4, shape=(160, 160)) * np.uint16(10)).astype("uint16")
        base[3] = 60_000  # near infrared
        base[:3, :50] = 65_535
        assert propose_value_range(base, bands=(1, 2, 3), nodata=65_535) == (0, 3000)
        assert propose_value_range(
            base.assign_attrs(nodatavals=(65_535.0,) * 4), bands=(3, 2, 1)
        ) == (
            0,
            3000,
        )
        told = refusal(base.assign_attrs(nodata=65_535).chmv2.predict, "demo", bands=(1, 2, 3))
        assert "value_range=(0, 3000)" in told

    def test_uint8_and_imagery_of_one_value(self):
        assert propose_value_range(picture()) == (0, 255)
        constant = picture().astype("float32") * 0 + 7
        with pytest.raises(ImageryError, match="different values in a small sample"):
            propose_value_range(constant)
        assert "reads a small sample and proposes one" in refusal(
            resolve_value_range, [constant.isel(band=k) for k in range(3)]
        )


class TestNodata:
    KEYS = ("_FillValue", "missing_value", "nodata", "fill_value", "nodatavals")

    def holes(self, value=0, dtype="uint8"):
        image = picture().astype(dtype)
        image[:, :15] = value
        return image

    @pytest.mark.parametrize("place", ["attrs", "encoding"])
    @pytest.mark.parametrize("key", KEYS)
    def test_any_spelling_makes_the_same_hole(self, key, place, tiny_checkpoint):
        image = self.holes()
        getattr(image, place)[key] = (0.0,) * 3 if key == "nodatavals" else 0
        height = image.chmv2.predict(tiny_checkpoint, **FAST)
        assert height[:15].isnull().all()
        assert height[15:].notnull().all()

    def test_a_dataset_declares_it_for_bands_that_do_not(self, tiny_checkpoint):
        bands = self.holes().to_dataset("band").rename({1: "red", 2: "green", 3: "blue"})
        height = bands.assign_attrs(nodata=0).chmv2.predict(tiny_checkpoint, **FAST)
        assert height[:15].isnull().all()
        for name in bands:
            bands[name].attrs["nodata"] = 255
        assert bands.assign_attrs(nodata=0).chmv2.predict(tiny_checkpoint, **FAST).notnull().all()

    @pytest.mark.parametrize("key", KEYS)
    def test_heights_are_read_by_the_same_rule(self, key):
        height = xr.DataArray(np.float32([[1, -9999]]), dims=("y", "x"), attrs={key: "-9999"})
        np.testing.assert_array_equal(read_heights(height), [[1, np.nan]])

    @pytest.mark.parametrize(
        "declared",
        [-3.4028234663852886e38, "-3.4e+38", -3.3999999521443642e38, np.float32(-3.4028235e38),
         -1.7976931348623157e308],
    )  # fmt: skip
    @pytest.mark.parametrize("stored", [-3.4028235e38, -3.4e38])
    def test_the_lowest_float_however_it_was_rounded(self, declared, stored):
        band = xr.DataArray(np.float32([[stored, 1, 0, -4]]), dims=("y", "x"))
        values = resolve_nodata([band.assign_attrs(nodata=declared)] * 3)
        np.testing.assert_array_equal(ValidPixels(values)([band.values] * 3), [[0, 1, 1, 1]])
        heights = read_heights(band.assign_attrs(_FillValue=declared))
        np.testing.assert_array_equal(heights.isnull(), [[1, 0, 0, 0]])

    def test_compared_in_the_bands_own_dtype(self):
        band = xr.DataArray(np.float32([[0.1, 1]]), dims=("y", "x"), attrs={"nodata": 0.1})
        np.testing.assert_array_equal(
            ValidPixels(resolve_nodata([band] * 3))([band.values] * 3), [[False, True]]
        )

    @pytest.mark.filterwarnings("ignore::xchmv2.errors.DemoModelWarning")
    @pytest.mark.parametrize("value", [np.nan, "nan", "NaN", "", "None", (np.nan,) * 3, None])
    def test_nan_and_nothing_are_no_value(self, value):
        assert resolve_nodata([picture()[0].assign_attrs(nodata=value)] * 3) == (None,) * 3
        floats = picture().astype("float32").assign_attrs(nodata=value)
        assert floats.chmv2.predict("demo", value_range=(0, 255), **FAST).notnull().all()
        both = picture()[0].astype("float32").assign_attrs(nodata=value, _FillValue=-1)
        assert resolve_nodata([both] * 3) == (-1.0,) * 3

    def test_nan_given_as_words(self):
        image = picture().astype("float32")
        told = refusal(image.chmv2.predict, "demo", nodata="nan", value_range=(0, 255))
        nodata = eval(re.search(r"nodata=(float\('nan'\))", told)[1])
        assert image.chmv2.plan("demo", nodata=nodata, value_range=(0, 255), **FAST)

    @pytest.mark.parametrize("value", [-9999, 256, 0.5, 65_535])
    def test_an_impossible_value_is_ignored_with_a_warning(self, value, tiny_checkpoint):
        image = picture().assign_attrs(nodata=value)
        with pytest.warns(UserWarning, match=f"nodata value {value} is ignored: no uint8") as said:
            height = image.chmv2.predict(tiny_checkpoint, **FAST)
        assert height.notnull().all()
        assert [warning.filename for warning in said] == [__file__]
        with pytest.warns(UserWarning, match="is ignored"):
            picture().chmv2.plan(tiny_checkpoint, nodata=value, **FAST)
        assert "can run" in str(image.chmv2)  # and no warning is given
        fits = image.assign_attrs(_FillValue=0)
        assert resolve_nodata([fits[0]] * 3) == (0.0,) * 3

    def test_contradictions_are_refused_and_the_argument_wins(self, tiny_checkpoint):
        image = self.holes().assign_attrs(nodata=0, _FillValue=255)
        told = refusal(image.chmv2.predict, tiny_checkpoint)
        assert "expected one nodata value, found _FillValue 255, nodata 0" in told
        height = image.chmv2.predict(tiny_checkpoint, nodata=0, **FAST)
        assert height[:15].isnull().all()
        array = self.holes().assign_attrs(_FillValue=0, nodata=255)
        exec(re.search(r"del array.*?\]", refusal(array.chmv2.predict, tiny_checkpoint))[0])
        assert array.chmv2.predict(tiny_checkpoint, **FAST)[:15].isnull().all()
        height = xr.DataArray(np.ones((2, 2)), dims=("y", "x")).assign_attrs(
            nodata=-1, _FillValue=-2
        )
        assert "one nodata value" in refusal(read_heights, height)

    def test_attributes_come_before_the_encoding(self):
        image = picture()[0].assign_attrs(nodata=0)
        image.encoding["_FillValue"] = 255
        assert resolve_nodata([image] * 3) == (0.0,) * 3

    @pytest.mark.parametrize("value", ["water", (0, 255), {"a": 1}])
    def test_what_is_no_number(self, value):
        told = refusal(resolve_nodata, [picture()[0].assign_attrs(missing_value=value)] * 3)
        assert "expected one number as nodata value, found missing_value" in told
        assert "del array.attrs['missing_value']" in told

    def test_values_for_each_band(self):
        image = self.holes().assign_attrs(nodatavals=(0.0, 7.0, 9.0))
        planes = [band.plane for band in select_bands(image)]
        assert resolve_nodata(planes) == (0.0, 7.0, 9.0)


@pytest.mark.parametrize("alpha", [False, True])
def test_what_a_plain_open_loses_and_the_lines_that_keep_it(tmp_path, tiny_checkpoint, alpha):
    """The lines are those of docs/imagery-requirements.md, which tests/test_docs.py runs too."""
    path, image, mask = tmp_path / "masked.tif", picture(4 if alpha else 3), np.full((40, 50), 255)
    mask[:, :20] = 0
    if alpha:
        image[3] = mask
    image.rio.to_raster(path)
    if not alpha:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
            file.write_mask(mask.astype("uint8"))
    options = FAST | {"bands": (1, 2, 3)}
    plain = rioxarray.open_rasterio(path)
    assert plain.chmv2.predict(tiny_checkpoint, **options).notnull().all()
    masked = rioxarray.open_rasterio(path, masked=True)
    valid = masked.isel(band=slice(3)).notnull().any("band")
    with rasterio.open(path) as file:
        colours = [colour.name for colour in file.colorinterp]
    plain = plain.assign_coords(colorinterp=("band", colours))
    height = plain.chmv2.predict(tiny_checkpoint, valid=valid, **FAST)
    np.testing.assert_array_equal(height.isnull(), mask == 0)
    if alpha:
        height = plain.chmv2.predict(tiny_checkpoint, valid=plain.sel(band=4) == 255, **FAST)
        np.testing.assert_array_equal(height.isnull(), mask == 0)


def test_the_overview_shows_which_is_red():
    assert "red: band 3, green: band 2" in str(picture(long_name=("Blue", "Green", "Red")).chmv2)
    assert "not clear" in str(picture(long_name=("nir", "red", "green")).chmv2)
    assert xchmv2.__version__
