"""Pixels of a date: its files opened and checked, resampled, and mosaicked pixel by pixel.

One rule says which pixels are empty, in ``predict`` and here: those that masks inside the files
leave out, and those that :class:`xchmv2.raster.ValidPixels` does by the nodata values. A resampled
pixel is valid if at least half of its area inside the image is; empty pixels have no share in its
colours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window

from xchmv2.errors import ImageryError
from xchmv2.imagery import WindowReader, map_axes
from xchmv2.raster import ValidPixels, can_hold
from xchmv2.stac.grids import grid_of, pixel_offset, pixel_on_ground, pixel_step
from xchmv2.stac.image_files import FileBands, Header, Sign, Unreadable, gdal, open_file, unreadable

_T = TypeVar("_T")
#: A half-open range of pixels along one axis.
Span = tuple[int, int]
#: Rows and columns of a window.
Block = tuple[Span, Span]
_Pixels = npt.NDArray[Any]
_Valid = npt.NDArray[np.bool_]

#: Images are coarser or finer than the grid if their pixels differ by more than this share.
_TOLERANCE = 0.01
#: Side of the cells that are resampled at a time, in pixels of the finer grid. Cells are counted
#: from the CRS origin, so that results do not depend on chunks.
_CELL = 512
#: Deviation that GDAL may make where it interpolates positions in a cell [px].
_EXACT = 0.01
_INTERPOLATING = ("nearest", "bilinear", "cubic", "cubic_spline", "lanczos")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFiles:
    """The files of one image: those of its colours, and that of its mask if there is one."""

    colours: tuple[FileBands, ...]
    #: Place of red, green and blue among the bands of the colours.
    order: tuple[int, ...]
    mask: FileBands | None
    #: Window of the grid to load on that the image may reach into.
    place: Block


@dataclass(frozen=True)
class BlockReader:
    """Reads blocks of the cube."""

    #: The whole grid to load on.
    box: GeoBox
    #: Data type of the colours, and their value where no image is.
    dtype: str
    fill: float
    #: Whether the user gave the data type, to which any other is converted.
    converts: bool
    #: Data type of the mask, its value where there is none, and whether its files' nodata count.
    mask: tuple[str, float, bool] | None
    #: The user's, which overrides those of files and items.
    nodata: float | None
    #: The user's; None averages by area where an image is finer than the grid, and else
    #: interpolates bilinearly.
    resampling: str | None
    mask_resampling: str
    overviews: bool
    fail_on_error: bool

    def read(
        self, access: Access, images: tuple[ImageFiles, ...], block: Block
    ) -> tuple[_Pixels, _Pixels | None]:
        """Mosaic the first valid pixel of several images, (3, h, w), and the mask beside it."""
        with gdal(access.settings):
            return self._mosaic(access, images, block)

    def _mosaic(
        self, access: Access, images: tuple[ImageFiles, ...], block: Block
    ) -> tuple[_Pixels, _Pixels | None]:
        shape = _shape(block)
        pixels = np.full((3, *shape), self.fill, self.dtype)
        mask = None if self.mask is None else np.full(shape, self.mask[1], self.mask[0])
        empty = np.ones(shape, bool)
        for image in images:
            inside = _overlap(block, image.place)
            at = _slices(inside, block)
            if not empty[at].any():
                continue
            try:
                values, valid = self._colours(access, image, inside)
                take = valid & empty[at]
                if mask is not None and image.mask is not None and take.any():
                    classes, known = self._classes(access, image.mask, inside)
                    np.copyto(mask[at], classes[0], where=take & known)
            except Unreadable as error:
                if self.fail_on_error:
                    raise
                _log.warning("left out: %s", error)
                continue
            np.copyto(pixels[:, *at], values, where=take)
            empty[at] &= ~take
        return pixels, mask

    def _colours(self, access: Access, image: ImageFiles, block: Block) -> tuple[_Pixels, _Valid]:
        with ExitStack() as stack:
            bands = _Bands(self, access, stack, image.colours, self.resampling, self.nodata)
            values, valid = bands.place(block, self.dtype)
        if image.order != (0, 1, 2):
            values = values[list(image.order)]
        if bands.silent:
            valid &= (values != 0).any(axis=0)
        _keep_apart(values, valid, self.fill)
        return values, valid

    def _classes(self, access: Access, file: FileBands, block: Block) -> tuple[_Pixels, _Valid]:
        dtype, _, counts = self.mask or ("uint8", 0, False)
        ignored = None if counts else math.nan
        with ExitStack() as stack:
            bands = _Bands(self, access, stack, (file,), self.mask_resampling, ignored)
            return bands.place(block, dtype)


def _shape(block: Block) -> tuple[int, int]:
    (top, bottom), (left, right) = block
    return bottom - top, right - left


def _overlap(one: Block, other: Block) -> Block:
    """Part of a window that lies in another one; empty at its first pixel if none does."""
    spans = []
    for (first, last), (start, stop) in zip(one, other, strict=True):
        begin = min(max(first, start), last)
        spans.append((begin, max(min(last, stop), begin)))
    return spans[0], spans[1]


def _slices(part: Block, whole: Block) -> tuple[slice, slice]:
    """Locate a window in an array of a larger one."""
    rows, cols = (slice(a - s, b - s) for (a, b), (s, _) in zip(part, whole, strict=True))
    return rows, cols


def _keep_apart(values: _Pixels, valid: _Valid, fill: float) -> None:
    """Change valid integers that would read as empty by one: their file says that they are not."""
    if values.dtype.kind in "iu":
        same = valid & (values == values.dtype.type(fill)).all(axis=0)
        if same.any():
            step = -1 if fill == np.iinfo(values.dtype).max else 1
            values[-1][same] = values.dtype.type(int(fill) + step)


@dataclass(frozen=True)
class Access:
    """How files are opened: who signs addresses, and the settings of GDAL."""

    sign: Sign | None
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class _Band:
    """One open file: the dataset that is read, perhaps an overview, and its grid."""

    spec: FileBands
    file: Any
    box: GeoBox
    #: Bands whose masks count, of ``whole``, the file at full resolution.
    masks: tuple[int, ...]
    address: str
    whole: Any
    #: Pixels of the whole file for each that is read.
    steps: tuple[float, float]

    @property
    def dtype(self) -> str:
        """Data type of its first band."""
        return str(self.file.dtypes[self.spec.bands[0] - 1])

    @property
    def nodata(self) -> list[float | None]:
        """Nodata value of each band: the file's own, else that of its item, if it can occur."""
        own = [self.file.nodatavals[number - 1] for number in self.spec.bands]
        stated = [info.nodata for info in self.spec.stated]
        found = [a if a is not None else b for a, b in zip(own, stated, strict=True)]
        return [v if v is not None and can_hold(np.dtype(self.dtype), v) else None for v in found]

    def read(self, block: Block) -> tuple[_Pixels, _Valid | None]:
        """Read (n, h, w) values of a window, and which of them a mask in the file leaves."""
        (top, bottom), (left, right) = block
        window = Window(left, top, right - left, bottom - top)
        where = f" (rows {top} to {bottom}, columns {left} to {right})"
        bands = list(self.spec.bands)

        def action() -> tuple[_Pixels, _Valid | None]:
            values = self.file.read(bands, window=window)
            if not self.masks:
                return values, None
            # Overviews may lack the mask, and say that all is valid.
            high, wide = self.steps
            at = Window(left * wide, top * high, (right - left) * wide, (bottom - top) * high)
            size = (len(self.masks), *values.shape[1:])
            masks = self.whole.read_masks(list(self.masks), window=at, out_shape=size)
            return values, (masks > 0).all(axis=0)

        return _attempt(action, self.spec.href, self.address, where)


def _attempt(action: Callable[[], _T], href: str, address: str, where: str = "") -> _T:
    """Do something with a file, or raise an error that names it."""
    try:
        return action()
    except RasterioError as error:
        failure = unreadable(href, address, error, where)
    # Raised here, it has no cause of rasterio's, which cannot be unpickled.
    raise failure


class _Bands:
    """The bands of an image in one or several files, brought together on the finest grid."""

    def __init__(
        self,
        reader: BlockReader,
        access: Access,
        stack: ExitStack,
        specs: tuple[FileBands, ...],
        way: str | None,
        nodata: float | None,
    ) -> None:
        self._target, self._way = reader.box, way
        self._files = [self._open(access, stack, spec, reader.overviews) for spec in specs]
        self._box = min((file.box for file in self._files), key=pixel_on_ground)
        self._scale = pixel_on_ground(reader.box) / pixel_on_ground(self._box)
        declared = [value for file in self._files for value in file.nodata]
        values = declared if nodata is None else [nodata] * len(declared)
        red, green, blue = values * 3 if len(values) == 1 else values
        self._rule = ValidPixels((red, green, blue))
        #: Whether neither the user nor file or item says anything about empty pixels.
        self.silent = all(
            not file.masks and np.dtype(file.dtype).kind in "iu" for file in self._files
        ) and values == [None] * len(values)

    def _open(self, access: Access, stack: ExitStack, spec: FileBands, overviews: bool) -> _Band:
        address = spec.href if access.sign is None else access.sign(spec.href)

        def opened(**options: Any) -> Any:
            return stack.enter_context(open_file(address, **options))

        file = _attempt(opened, spec.href, address)
        header = Header.of(file)
        box, masks = spec.verified(header), spec.masks(header)
        shrink = pixel_on_ground(self._target) / pixel_on_ground(box) * (1 + 1e-6)
        levels = [n for n, level in enumerate(file.overviews(spec.bands[0])) if level <= shrink]
        steps, whole = (1.0, 1.0), file
        if overviews and levels:
            file = _attempt(lambda: opened(overview_level=levels[-1]), spec.href, address)
            steps = (whole.height / file.height, whole.width / file.width)
            box = GeoBox(file.shape, box.affine * Affine.scale(*steps[::-1]), box.crs)
        return _Band(spec, file, box, masks, address, whole, steps)

    def _native(self, block: Block) -> tuple[_Pixels, _Valid]:
        """Values (n, h, w) and valid pixels of a window of the finest grid."""
        parts, valid = [], None
        for file in self._files:
            same = file.box == self._box
            values, mask = file.read(block) if same else _onto(file, _crop(self._box, block))
            parts.append(values)
            if mask is not None:
                valid = mask if valid is None else valid & mask
        bands = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return bands, self._rule([*bands, *bands, *bands][:3], valid)

    def place(self, block: Block, dtype: str) -> tuple[_Pixels, _Valid]:
        """Read a window of the target grid: values (n, h, w) in a data type, and valid pixels."""
        count = sum(len(file.spec.bands) for file in self._files)
        values = np.zeros((count, *_shape(block)), dtype)
        valid = np.zeros(_shape(block), bool)
        for part, found, seen in self._iter_parts(block):
            at = _slices(part, block)
            values[:, *at] = self._stored(found, seen, np.dtype(dtype))
            valid[at] = seen
        return values, valid

    def _iter_parts(self, block: Block) -> Iterator[tuple[Block, _Pixels, _Valid]]:
        """Yield windows of the target with their pixels: copied, or resampled as by predict."""
        offset, step = pixel_offset(self._box, self._target), pixel_step(self._box, self._target)
        axes = None
        if self._way is None and step is not None and step.a > 0 and step.e > 0:
            axes = map_axes(grid_of(self._box), grid_of(self._target))
        if offset is not None:
            (top, left), (rows, cols) = offset, self._box.shape
            part = _overlap(block, ((-top, rows - top), (-left, cols - left)))
            if math.prod(_shape(part)):
                (first, last), (start, stop) = part
                yield part, *self._native(((first + top, last + top), (start + left, stop + left)))
        elif axes is not None:
            yield from self._iter_resampled(block, axes)
        else:
            yield from self._iter_warped(block)

    def _iter_resampled(self, block: Block, axes: Any) -> Iterator[tuple[Block, _Pixels, _Valid]]:
        read = WindowReader(ValidPixels((None, None, None)), *axes)
        reach = _overlap(block, (_reach(axes[0]), _reach(axes[1])))
        for cell in self._iter_cells(reach):
            part = _overlap(reach, cell)
            source = (read.source_span(0, *part[0]), read.source_span(1, *part[1]))
            if min(*_shape(part), *_shape(source)) > 0:
                yield part, *read(*self._native(source), part)

    def _iter_warped(self, block: Block) -> Iterator[tuple[Block, _Pixels, _Valid]]:
        scale = max(self._scale, 1.0)
        way = self._way or ("average" if scale > 1 + _TOLERANCE else "bilinear")
        for cell in self._iter_cells(block):
            target = _crop(self._target, cell)
            source = _source_window(self._box, target, scale)
            if source is not None:
                crop = _crop(self._box, source)
                values, valid = _warp(*self._native(source), crop, target, way, scale)
                part = _overlap(block, cell)
                at = _slices(part, cell)
                yield part, values[:, *at], valid[at]

    def _iter_cells(self, block: Block) -> Iterator[Block]:
        """Yield cells that cover a window, bounded in source pixels, wherever it begins."""
        size = max(32, int(_CELL / 2 ** math.ceil(math.log2(max(self._scale, 1.0)))))
        origin = grid_of(self._target).origin if self._target.axis_aligned else (0, 0)
        rows, cols = (
            [(at, at + size) for at in range((start + o) // size * size - o, stop, size)]
            for (start, stop), o in zip(block, origin, strict=True)
        )
        return ((row, col) for row in rows for col in cols)

    def _stored(self, values: _Pixels, valid: _Valid, dtype: np.dtype[Any]) -> _Pixels:
        """Convert to the data type of the cube; values that it cannot hold are an error."""
        if values.dtype == dtype or dtype.kind == "f":
            return values.astype(dtype, copy=False)
        limits = np.iinfo(dtype)
        found = np.where(valid, values, 0)
        own = np.dtype(self._files[0].dtype)
        if not np.can_cast(own, dtype) and (found.min() < limits.min or found.max() > limits.max):
            raise ImageryError(
                f"values that fit into {dtype}",
                f"{found.min():g} to {found.max():g} in {self._files[0].spec.item}",
                f"keep those of the files: xchmv2.load(..., dtype={str(own)!r})",
            )
        if values.dtype.kind == "f":
            found = np.rint(found)
        return np.clip(found, limits.min, limits.max).astype(dtype)


def _crop(box: GeoBox, block: Block) -> GeoBox:
    (top, _), (left, _) = block
    return GeoBox(_shape(block), box.affine * Affine.translation(left, top), box.crs)


def _reach(axis: Any) -> Span:
    """Target pixels that a source reaches into along one axis."""
    first = math.floor(-axis.offset / axis.ratio)
    return first, math.ceil((axis.source_size - axis.offset) / axis.ratio)


def _source_window(source: GeoBox, target: GeoBox, scale: float) -> Block | None:
    """Source pixels that a target may need; None if there are none."""
    rows, cols = (np.linspace(0, size, 9) for size in target.shape)
    x, y = target.affine * (np.tile(cols, 9), np.repeat(rows, 9))
    if source.crs != target.crs:
        x, y = target.crs.transformer_to_crs(source.crs)(x, y)
    found = ~source.affine * (np.asarray(x), np.asarray(y))
    spans = []
    margin = math.ceil(3 * scale) + 2  # reach of the widest kernel
    for at, size in zip(found[::-1], source.shape, strict=True):
        at = at[np.isfinite(at)]
        if not at.size:
            return None
        first, last = math.floor(at.min()) - margin, math.ceil(at.max()) + margin
        spans.append((max(first, 0), min(last, size)))
    return (spans[0], spans[1]) if all(a < b for a, b in spans) else None


def _warp(
    bands: _Pixels, valid: _Valid, source: GeoBox, target: GeoBox, way: str, scale: float = 1.0
) -> tuple[_Pixels, _Valid]:
    """Resample with GDAL, all bands alike: (n, H, W) and (H, W) -> (n, h, w) and (h, w).

    Empty pixels are NaN in all bands, so that they have no share in any. ``scale`` is the size of a
    target pixel in source pixels, which GDAL would else derive from the window.
    """
    places = dict(
        src_transform=source.affine, src_crs=str(source.crs),
        dst_transform=target.affine, dst_crs=str(target.crs), tolerance=_EXACT,
        XSCALE=1 / scale, YSCALE=1 / scale,
    )  # fmt: skip
    kind = np.result_type(bands.dtype, np.float32)
    found = np.full((len(bands), *target.shape), np.nan, kind)
    whole = bool(valid.all())
    # GDAL is faster where it need not look for empty pixels.
    empty = {} if whole else {"src_nodata": np.nan, "dst_nodata": np.nan}
    values = (bands if whole else np.where(valid, bands, np.nan)).astype(kind, copy=False)
    reproject(values, found, resampling=Resampling[way], init_dest_nodata=False, **empty, **places)
    seen = np.asarray(np.isfinite(found).all(axis=0))
    if not whole:
        share = np.zeros(target.shape, np.float32)
        by = way if way in _INTERPOLATING else "average"
        reproject(valid.astype(np.float32), share, resampling=Resampling[by], **places)
        seen &= share >= 0.5
    return found, seen


def _onto(file: _Band, target: GeoBox) -> tuple[_Pixels, _Valid | None]:
    """Read a band on the finer grid of another one, by nearest neighbour."""
    window = _source_window(file.box, target, 1.0)
    if window is None:
        count = len(file.spec.bands)
        return np.zeros((count, *target.shape), np.float32), np.zeros(target.shape, bool)
    values, mask = file.read(window)
    valid = np.ones(values.shape[1:], bool) if mask is None else mask
    found, seen = _warp(values, valid, _crop(file.box, window), target, "nearest")
    return np.where(seen, found, 0).astype(values.dtype), seen
