"""Images as datasets hold them -> RGB pictures, and the checks that keep a bad one from stopping a run hours in."""

import hashlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from r1v_rl.errors import DataError
from r1v_rl.types import ImageSource

MAX_PIXELS = 40_000_000
MAX_ASPECT_RATIO = 200
MIN_SIDE = 2
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What may be opened; the rest of Pillow's readers (some start other programs) stay closed."""

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")
_EXIF_ORIENTATION, _TURNED = 0x0112, range(5, 9)
_16_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)
"""What Pillow raises on damaged files."""


def load_image(source: ImageSource) -> Image.Image:
    """The picture in RGB: turned as its EXIF data says, transparent parts on white, 16-bit grey scaled to 8.

    Args:
        source: A PIL image, encoded bytes, a path, or `{"bytes": ..., "path": ...}` as Hugging Face datasets stores it.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    try:
        with _open(source) as image:
            return _to_rgb(image)
    except (*_FAULTS, Image.DecompressionBombError) as error:
        raise DataError(f"image {name_of(source)} cannot be read: {error}") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) of what `load_image` returns, from the header alone."""
    if isinstance(source, Image.Image):
        return _turned_size(source)
    try:
        with _open(source) as image:
            return _turned_size(image)
    except (*_FAULTS, Image.DecompressionBombError) as error:
        raise DataError(f"image {name_of(source)} cannot be read: {error}") from error


def image_hash(source: ImageSource) -> str:
    """sha256 of size and RGB pixels: equal for equal pictures, however they are stored."""
    image = load_image(source)
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def check_image(source: ImageSource, *, row_id: str | None, root: Path | None = None) -> None:
    """Read the header, then as much of the file as shows that it is whole.

    Args:
        row_id: Of the dataset's row that holds the image; None where there is no dataset.
        root: Folder that a path must stay in, symbolic links followed; None = anywhere.

    Raises:
        DataError: Naming the row, the image and what to do.
    """
    if isinstance(source, str | Path) or (isinstance(source, Mapping) and source.get("bytes") is None):
        _check_path(source.get("path") if isinstance(source, Mapping) else source, row_id, root)
    elif not isinstance(source, Image.Image | bytes | Mapping):
        kind = type(source).__name__
        raise DataError(f"{_row(row_id)}an image must be a path, encoded bytes or a PIL image, received {kind}")
    where = f"{_row(row_id)}image {name_of(source)}"
    if isinstance(source, Image.Image):
        _check_shape(source, where)
        return
    try:
        with _open(source) as image:
            _check_shape(image, where)
            complete = image.format == "PNG"
            if complete:
                image.verify()  # every chunk and its checksum
        if not complete:
            _decode_small(source)
    except Image.DecompressionBombError:
        raise DataError(f"{where} has more than {MAX_PIXELS // 10**6} megapixels; scale it down") from None
    except UnidentifiedImageError:
        raise DataError(f"{where} is not an image of a known format ({', '.join(FORMATS)}); replace it") from None
    except DataError:
        raise
    except _FAULTS as error:
        mend = "replace the file" if row_id is None else "replace the file or drop the row"
        raise DataError(f"{where} is damaged ({error}); {mend}") from error


def resolve_image(source: Any, root: Path | None) -> ImageSource:
    """The source with a relative path put under `root`; anything else as it stands."""
    if isinstance(source, Mapping):
        if source.get("bytes") is not None:
            return source["bytes"]
        source = source.get("path")
    if isinstance(source, str | Path) and root is not None and not _URL.match(str(source)):
        return str(root / source)
    return source


def name_of(source: ImageSource) -> str:
    """How a message calls an image."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, bytes):
        return f"({len(source)} bytes)"
    return "(in memory)" if isinstance(source, Image.Image) else str(source)[:200]


def _open(source: ImageSource) -> Image.Image:
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_shape` sets a lower limit
        return Image.open(file, formats=FORMATS)


def _turned_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    return (image.height, image.width) if turned else (image.width, image.height)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in _16_BIT_MODES:
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _row(row_id: str | None) -> str:
    return "" if row_id is None else f"row {row_id}: "


def _check_path(path: Any, row_id: str | None, root: Path | None) -> None:
    if not isinstance(path, str | Path) or not str(path):
        raise DataError(f"{_row(row_id)}an image must be a path, encoded bytes or a PIL image, received {path!r}")
    where = f"{_row(row_id)}image {name_of(path)}"
    if _URL.match(str(path)):
        raise DataError(f"{where} is an address; images are never fetched: download it and give its path")
    if "\0" in str(path):
        raise DataError(f"{where} is not a path")
    if root is not None and not Path(path).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where} lies outside {root}; set `dataset_root` to a folder that holds all images")
    if not Path(path).exists():
        hint = "" if row_id is None else "; relative paths start at `dataset_root`"
        raise DataError(f"{where} does not exist{hint}")
    if not Path(path).is_file():
        raise DataError(f"{where} is not a regular file")


def _check_shape(image: Image.Image, where: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{where} has {width} x {height} pixels, above {MAX_PIXELS // 10**6} megapixels; scale it down")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(
            f"{where} has {width} x {height} pixels; each side must have {MIN_SIDE} or more and the longer one be at "
            f"most {MAX_ASPECT_RATIO} times the shorter; crop or pad it"
        )
    if image.mode in ("I", "F"):
        raise DataError(f"{where} has 32-bit pixels (mode {image.mode}), whose range is unknown; save it with 8 bits")


def _decode_small(source: ImageSource) -> None:
    """Decode the whole file, a JPEG at an eighth of its size, which takes a third of the time and reads every byte."""
    with _open(source) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
