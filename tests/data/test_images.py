"""Images of every kind that users have: accepted and turned into RGB, or refused with row, path and reason."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from r1v_rl.data.images import MAX_PIXELS, check_image, image_hash, image_size, load_image
from r1v_rl.errors import DataError


def picture(size=(40, 30), seed=0) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, compressed_pixels: bytes = zlib.compress(b""), colour: int = 2) -> bytes:
    """A PNG that promises a size; without pixels unless given."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compressed_pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    check_image(image, row_id="a")
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("holder", ["bytes", "path", "mapping", "mapping with a path"])
def test_every_format_and_every_way_to_hold_it(tmp_path, kind, holder):
    data = encoded(picture(), kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    source = {
        "bytes": data,
        "path": str(path),
        "mapping": {"bytes": data, "path": None},
        "mapping with a path": {"bytes": None, "path": str(path)},
    }[holder]
    check_image(source, row_id="a", root=tmp_path)
    assert load_image(source).size == image_size(source) == (40, 30)


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 255, 255))
    loaded = load_image(encoded(image))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (0, 0, 255)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((2, 2), 1)
    loaded = load_image(encoded(image, "PNG", transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((2, 2)) == (200, 100, 0)


def test_the_picture_is_turned_as_its_exif_data_says():
    upright = Image.new("RGB", (40, 30))
    upright.paste((255, 255, 255), (0, 0, 10, 10))  # a white top left corner
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    source = encoded(upright, "PNG", exif=exif)
    loaded = load_image(source)
    assert loaded.size == image_size(source) == (30, 40)
    assert loaded.getpixel((29, 0)) == (255, 255, 255)
    assert loaded.getpixel((0, 0)) == (0, 0, 0)


def test_16_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16))
    assert np.array(load_image(encoded(image)))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_the_hash_is_of_the_picture_not_of_its_file():
    image = picture()
    hashes = {image_hash(image), image_hash(encoded(image)), image_hash(encoded(image, "BMP"))}
    assert len(hashes) == 1
    assert image_hash(picture(seed=1)) not in hashes
    assert image_hash(Image.new("RGB", (2, 8))) != image_hash(Image.new("RGB", (8, 2)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_file_cut_short_is_refused(kind, kept):
    data = encoded(picture((200, 150)), kind)
    with pytest.raises(DataError, match=r"row r7: image .*(damaged|known format)"):
        check_image(data[: int(len(data) * kept)], row_id="r7")


def test_a_flipped_byte_in_a_png_is_refused():
    data = bytearray(encoded(picture()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match=r"row r7: .*damaged"):
        check_image(bytes(data), row_id="r7")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "known format"),
        (b"<html>404</html>", "known format"),
        (b"\0" * 500, "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "known format"),
        (png(12_000, 12_000), "12000 x 12000 pixels, above 40 megapixels; scale it down"),
        (png(60_000, 60_000), "megapixels; scale it down"),
        (png(5000, 2), "5000 x 2 pixels; .*at most 200 times the shorter; crop or pad"),
        (png(1, 1), "each side must have 2 or more"),
        (encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"), "32-bit pixels"),
        (7, "must be a path, encoded bytes or a PIL image, received int"),
        (None, "must be a path, encoded bytes or a PIL image"),
        ({"bytes": None, "path": None}, "must be a path"),
    ],
)
def test_what_is_no_usable_picture_is_refused(data, message):
    with pytest.raises(DataError, match=rf"^row r7: (image .*|an image )({message})"):
        check_image(data, row_id="r7")


def test_a_bomb_is_refused_from_its_header(tmp_path):
    """12,000 x 12,000 grey pixels, sound in every byte, would take 144 MB decoded; the check may not decode them."""
    side = 12_000
    assert side * side > MAX_PIXELS
    squeeze = zlib.compressobj()
    pixels = b"".join([squeeze.compress(bytes(side + 1)) for _ in range(side)]) + squeeze.flush()
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, pixels, colour=0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="above 40 megapixels"):
        check_image(str(path), row_id="r7")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "does not exist; relative paths start at `dataset_root`"),
        ("folder", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("../outside.png", "lies outside"),
        ("link_out.png", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("http://169.254.169.254/latest/meta-data", "is an address; images are never fetched"),
        ("file:///etc/passwd", "is an address"),
        ("data:image/png;base64,AAAA", "is an address"),
        ("bad\0name.png", "is not a path"),
    ],
)
def test_bad_paths_are_refused(tmp_path, name, message):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    os.mkfifo(root / "pipe")
    picture().save(tmp_path / "outside.png")
    (root / "link_out.png").symlink_to(tmp_path / "outside.png")
    source = name if ":" in name else str(root / name)
    with pytest.raises(DataError, match=f"row r7: image .*{message}"):
        check_image(source, row_id="r7", root=root)


def test_a_link_that_stays_inside_is_accepted(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    check_image(str(tmp_path / "link.png"), row_id="a", root=tmp_path)


def test_reading_a_vanished_file_names_it(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        load_image(str(tmp_path / "gone.png"))
