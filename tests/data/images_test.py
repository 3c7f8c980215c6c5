import io
import warnings

import numpy as np
import pytest
from PIL import Image, features

from meta_jax.data.dataset import DataError
from meta_jax.data.images import image_pixels, is_image_file, open_image, resize_image
from meta_jax.data.pixels import with_channels


def _encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _pixels(encoded, size=4):
    return image_pixels(open_image(encoded, "x"), size, "x")


def _assert_filled(pixels, expected, atol=0):
    assert pixels.dtype == np.uint8
    expected = np.broadcast_to(expected, (*pixels.shape[:2], len(expected)))
    np.testing.assert_allclose(pixels, expected, atol=atol)


def test_open_image_names_what_does_not_decode():
    with pytest.raises(DataError, match=r"cats/1\.png does not decode"):
        open_image(b"\x89PNG\r\n\x1a\nnonsense", "cats/1.png")


def test_open_image_tells_absent_files_and_folders_from_broken_images(tmp_path):
    with pytest.raises(DataError, match="x is a folder: give the images in it"):
        open_image(str(tmp_path), "x")
    with pytest.raises(DataError, match="x does not exist: correct its name"):
        open_image(str(tmp_path / "absent.png"), "x")


def test_resize_image_keeps_an_image_of_the_right_size_and_refuses_unknown_filters():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_array_equal(resize_image(Image.fromarray(pixels), 4)[..., 0], pixels)
    with pytest.raises(DataError, match="'cubic' is none of nearest, box"):
        resize_image(Image.fromarray(pixels), 4, "cubic")
    with pytest.raises(DataError, match="at least 1 pixel, not 0"):
        resize_image(Image.fromarray(pixels), 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), [255]),
        (Image.new("L", (4, 4), 70), [70]),
        (Image.fromarray(np.full((4, 4), 40 * 256 + 3, np.uint16)), [40]),
        (Image.new("RGB", (4, 4), (1, 2, 3)), [1, 2, 3]),
        (Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=1), [9, 8, 7]),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (4, 4), (60, 255)), [60, 60, 60]),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), [255, 255, 255]),
    ],
)
def test_image_pixels_of_every_mode(image, expected):
    _assert_filled(image_pixels(image, 2), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 200]], np.uint16), [0, 200]),  # 8 bits in a 16-bit file
        (np.array([[0, 4095, 1000]], np.uint16), [0, 255, 62]),  # 12 bits
        (np.array([[0, 65535, 4112]], np.uint16), [0, 255, 16]),  # 16 bits
        (np.array([[7, 255]], np.int32), [7, 255]),
        (np.array([[0, 40000, 65535]], np.int32), [0, 156, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),  # shares of white
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_depth(values, expected):
    side = values.shape[1]
    # PNG has no samples of 32 bits.
    for file_format in ("PNG", "TIFF") if values.dtype == np.uint16 else ("TIFF",):
        image = open_image(_encoded(Image.fromarray(values), file_format), "x")
        pixels = image_pixels(image.resize((side, side), Image.Resampling.NEAREST), side)
        np.testing.assert_array_equal(pixels[0, :, 0], expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-0.1, "negative"), (np.nan, "not finite"), (np.inf, "not finite"), (70000.0, "beyond 16")],
)
def test_values_that_cannot_be_understood_are_refused(value, message):
    image = Image.fromarray(np.array([[0.5, value]], np.float32))
    with pytest.raises(DataError, match=f"a.tif does not decode.*{message}"):
        image_pixels(image, 2, "a.tif")


def _half_black():
    """White, the upper half black."""
    values = np.full((8, 8, 3), 255, np.uint8)
    values[:4] = 0
    return Image.fromarray(values)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_exif_says(file_format, orientation):
    turn = {  # how the camera stored what is upright
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = _half_black()
    if orientation in turn:
        stored = stored.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = _pixels(_encoded(stored, file_format, exif=exif), 8)
    np.testing.assert_allclose(pixels[:, :, 0], np.asarray(_half_black())[:, :, 0], atol=25)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_passed_over():
    encoded = _encoded(_half_black(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\1" * 9)
    assert _pixels(encoded, 8)[0, 0, 0] < 25


def test_file_formats():
    red = Image.new("RGB", (6, 6), (200, 10, 20))
    for file_format, options in {
        "PNG": {},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "GIF": {},
        "JPEG": {"quality": 95},
        **({"WEBP": {"lossless": True}} if features.check("webp") else {}),
    }.items():
        _assert_filled(_pixels(_encoded(red, file_format, **options)), [200, 10, 20], atol=3)


def test_the_first_frame_and_page_counts():
    frames = [Image.new("L", (4, 4), value) for value in (30, 90)]
    for file_format in ("GIF", "TIFF"):
        encoded = _encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
        assert _pixels(encoded)[0, 0, 0] == 30


def test_cmyk_jpeg():
    cmyk = Image.new("RGB", (8, 8), (255, 255, 0)).convert("CMYK")
    _assert_filled(_pixels(_encoded(cmyk, "JPEG", quality=95)), [255, 255, 0], atol=6)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (0, 0, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(1, (0, 0, 4, 2))
    for encoded in (
        _encoded(Image.fromarray(rgba), "PNG"),
        _encoded(palette, "PNG", transparency=0),
        _encoded(palette, "GIF", transparency=0),
    ):
        pixels = _pixels(encoded)
        _assert_filled(pixels[:2], [0, 0, 255])
        _assert_filled(pixels[2:], [255, 255, 255])


def test_transparency_of_16_bit_grey_does_not_clip_it():
    values = Image.fromarray(np.full((4, 4), 20000, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(_encoded(values, "PNG"), "x")
    image.info["transparency"] = 0
    _assert_filled(image_pixels(image, 4), [78])


def test_is_image_file_looks_at_the_ending_in_either_case():
    assert all(map(is_image_file, ("a.png", "b b.JPeG", "é.TIF", "x.webp")))
    assert not any(map(is_image_file, ("a.txt", "png", "a.png.zip")))


def test_with_channels():
    grey = np.full((2, 2, 1), 5, np.uint8)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    _assert_filled(with_channels(grey, 3), [5, 5, 5])
    _assert_filled(with_channels(grey, 1), [5])
    _assert_filled(with_channels(red, 3), [200, 0, 0])
    _assert_filled(with_channels(red, 1), [60])  # 0.299 * 200
    _assert_filled(with_channels(np.full((2, 2, 3), 6, np.uint8), 1), [6])
