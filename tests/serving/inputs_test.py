"""Inputs as they come become what a learner was trained on."""

import jax
import numpy as np
import pytest
from PIL import Image

from meta_jax.data.source import image_preprocessing
from meta_jax.lookup import UsageError
from meta_jax.serving.inputs import InputForm, prepare

SIZE = 8


def form_of(channels=1, polarity="as_is", size=SIZE, **settings):
    example = jax.ShapeDtypeStruct((size, size, channels), np.float32)
    record = image_preprocessing(size, channels, polarity=polarity, resample="lanczos")
    return InputForm(example, record, **settings)


def vectors(dtype=np.float32, shape=(5,)):
    return InputForm(jax.ShapeDtypeStruct(shape, dtype), None)


def made(inputs, form):
    return prepare(inputs, form)[0]


@pytest.fixture
def stroke():
    """A light stroke on dark, bytes [3, SIZE, SIZE]."""
    images = np.zeros((3, SIZE, SIZE), np.uint8)
    images[:, 3, 1:7] = 255
    images[1:, 5, 2] = 200
    return images


def test_every_range_and_kind_of_image_gives_the_same_input(stroke, tmp_path):
    expected = stroke[..., None].astype(np.float32) / 255
    for index, image in enumerate(stroke):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    given = {
        "bytes": stroke,
        "with channels": stroke[..., None],
        "colours": np.repeat(stroke[..., None], 3, -1),
        "integers": stroke.astype(np.int64),
        "floats to 255": stroke.astype(np.float64),
        "floats to 1": stroke / 255,
        "jax": jax.numpy.asarray(stroke),
        "list": list(stroke),
        "pillow": [Image.fromarray(image) for image in stroke],
        "paths": [tmp_path / f"{index}.png" for index in range(3)],
    }
    for name, inputs in given.items():
        np.testing.assert_allclose(made(inputs, form_of()), expected, atol=1e-7, err_msg=name)


def test_bools_are_ink():
    images = np.eye(SIZE, dtype=bool)[None]
    assert made(images, form_of()).ravel().tolist() == np.eye(SIZE).ravel().tolist()


def test_floats_of_the_right_size_keep_their_precision():
    images = np.full((1, SIZE, SIZE, 1), 0.1234567, np.float32)
    assert abs(made(images, form_of()) - 0.1234567).max() < 1e-6


def test_images_of_any_size_are_resized_as_files_are(stroke, tmp_path):
    large = np.kron(stroke[0], np.ones((5, 3), np.uint8))
    Image.fromarray(large).save(tmp_path / "large.png")
    of_file = made([tmp_path / "large.png"], form_of())
    assert of_file.shape == (1, SIZE, SIZE, 1)
    np.testing.assert_array_equal(made([large], form_of()), of_file)
    np.testing.assert_allclose(made([large / 255], form_of()), of_file, atol=1e-7)


def test_channels_are_those_of_training():
    red = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    red[..., 0] = 255
    assert made(red, form_of(channels=3))[0, 0, 0].tolist() == [1, 0, 0]
    np.testing.assert_allclose(made(red, form_of())[0, 0, 0], [76 / 255], atol=1e-6)  # its luma
    grey = np.full((1, SIZE, SIZE), 51, np.uint8)
    np.testing.assert_allclose(made(grey, form_of(channels=3))[0, 0, 0], [0.2] * 3, atol=1e-6)


def test_transparency_is_laid_on_white():
    clear = np.zeros((1, SIZE, SIZE, 4), np.uint8)
    assert (made(clear, form_of(channels=3)) == 1).all()


@pytest.mark.parametrize("wanted", ["ink_light", "ink_dark"])
def test_ink_and_paper_are_those_of_training(stroke, wanted):
    light = stroke[..., None].astype(np.float32) / 255
    expected = light if wanted == "ink_light" else 1 - light
    mixed = np.stack([stroke[0], 255 - stroke[1], stroke[2]])  # each image tells its own
    np.testing.assert_allclose(made(mixed, form_of(polarity=wanted)), expected, atol=1e-6)
    said = form_of(polarity=wanted)._replace(polarity="ink_light")
    np.testing.assert_allclose(made(stroke, said), expected, atol=1e-6)


def test_photos_keep_their_polarity(stroke):
    assert (made(255 - stroke, form_of())[:, 0, 0] == 1).all()


def test_a_grey_border_does_not_say_which_is_ink():
    images = np.full((2, SIZE, SIZE), 128, np.uint8)
    images[0] = 0
    with pytest.raises(UsageError, match=r"image 1 has a grey border.*polarity="):
        made(images, form_of(polarity="ink_light"))
    assert made(images, form_of(polarity="ink_light")._replace(polarity="ink_dark")).shape[0] == 2


def test_queries_follow_the_range_of_the_support(stroke):
    _, form = prepare(stroke.astype(np.float32), form_of())
    assert form.value_range == "0..255"
    dark = np.full((1, SIZE, SIZE), 1.0)  # nearly black, and no white
    assert abs(made(dark, form) - 1 / 255).max() < 1e-7
    _, form = prepare(stroke / 255, form_of())
    with pytest.raises(UsageError, match="follow a support set in"):
        made(stroke.astype(float), form)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((1, SIZE, SIZE), 300), "values from 300 to 300"),
        (np.full((1, SIZE, SIZE), -0.5), "values from -0.5"),
        (np.full((1, SIZE, SIZE), np.nan), "values from nan"),
        (np.full((1, SIZE, SIZE), 1.5), "may be meant as"),
        (np.eye(SIZE, dtype=np.uint8)[None], "give it as bools"),
        (np.zeros((SIZE, SIZE)), "are no batch"),
        (np.zeros((SIZE, SIZE, 3)), "are no batch"),
        (np.zeros((0, SIZE, SIZE)), "no image"),
        ([np.zeros((SIZE, SIZE, 7))], "channels"),
        ("one.png", "give a list"),
        ([np.array([["a"]])], "as numbers"),
    ],
)
def test_what_cannot_be_told_is_refused(images, message):
    with pytest.raises(UsageError, match=message):
        made(images, form_of())


def test_other_inputs_have_the_shape_and_kind_of_training():
    x = np.arange(10).reshape(2, 5)
    assert made(x, vectors()).dtype == np.float32
    assert made(x.astype(np.float64), vectors()).tolist() == x.tolist()
    ids = InputForm({"ids": jax.ShapeDtypeStruct((3,), np.int32)}, None)
    assert made({"ids": np.ones((2, 3), int)}, ids)["ids"].dtype == np.int32
    for inputs, form, message in (
        (np.zeros((2, 4)), vectors(), r"shape \[2, 4\]: give \[n, 5\]"),
        (np.zeros((2, 5), np.uint8), vectors(), "inputs are bytes"),
        (np.full((2, 5), np.nan), vectors(), "the input array is not finite in row 0"),
        (np.zeros((2, 5)), vectors(np.int32), "float64, and the learner was trained on int32"),
        ({"words": np.zeros((2, 3))}, ids, "structure"),
    ):
        with pytest.raises(UsageError, match=message):
            made(inputs, form)
