import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.data.augmentation import _transform, affine_matrices, augmented, random_affine

KEY = jax.random.key(0)
IDENTITY = jnp.eye(2)


def picture(height=9, width=7, channels=2):
    return np.random.default_rng(0).random((height, width, channels), np.float32)


transform = jax.jit(_transform)
random_affines = jax.jit(random_affine)


def test_the_identity_changes_nothing():
    image = picture()
    np.testing.assert_allclose(transform(image, IDENTITY, np.zeros(2)), image, atol=1e-6)


def test_a_shift_moves_right_and_down_by_its_pixels():
    image = picture()
    moved = transform(image, IDENTITY, np.array([2.0, 1.0]))
    np.testing.assert_allclose(moved[1:, 2:], image[:-1, :-2], atol=1e-6)
    # The border's pixels move in.
    np.testing.assert_allclose(moved[1:, 0], image[:-1, 0], atol=1e-6)


def test_ninety_degrees_turn_the_picture_about_its_centre():
    image = picture(8, 8)
    matrix = affine_matrices(jnp.array([[90.0, 0.0, 0.0, 1.0, 1.0]]))[0]
    # Columns to the right and rows downwards: a positive angle turns clockwise.
    np.testing.assert_allclose(
        transform(image, matrix, np.zeros(2)), np.rot90(image, -1), atol=1e-5
    )


@pytest.mark.parametrize(
    ("values", "matrix"),
    [
        ((0, 0.3, 0, 1, 1), [[1, 0.3], [0, 1]]),
        ((0, 0, -0.2, 1, 1), [[1, 0], [-0.2, 1]]),
        ((0, 0, 0, 0.8, 1.2), [[0.8, 0], [0, 1.2]]),
        ((90, 0.3, 0, 0.5, 2), [[0, -2], [0.5, 0.6]]),
    ],
)
def test_matrices_by_hand(values, matrix):
    found = affine_matrices(jnp.array([values], float))
    np.testing.assert_allclose(found[0], matrix, atol=1e-6)


def test_every_image_is_changed_by_itself_and_some_are_not():
    image = picture(12, 12, 1)
    changed = jax.jit(random_affine)(KEY, jnp.tile(image, (400, 1, 1, 1)))
    assert changed.shape == (400, 12, 12, 1)
    assert changed.min() >= 0
    assert changed.max() <= 1
    unchanged = (abs(changed - image).max((1, 2, 3)) < 1e-5).mean()
    # All seven out of use: 1 in 128.
    assert 0 < unchanged < 0.03
    assert len({row.tobytes() for row in np.asarray(changed)}) > 380


def test_shifts_stay_within_two_pixels():
    images = np.zeros((300, 21, 21, 1), np.float32)
    images[:, 10, 10] = 1
    changed = np.asarray(random_affines(KEY, images))[..., 0]
    rows, columns = np.mgrid[:21, :21] - 10
    mass = changed.sum((1, 2))
    for place in (rows, columns):
        mean = (changed * place).sum((1, 2)) / mass
        assert abs(mean).max() < 2.5
        assert mean.max() > 1.5 > -1.5 > mean.min()
        assert 0.3 < (abs(mean) < 0.01).mean() < 0.7


def test_dtype_and_shape_stay():
    images = picture(6, 5)[None].astype(jnp.bfloat16)
    moved = random_affines(KEY, images)
    assert moved.dtype == jnp.bfloat16
    assert moved.shape == images.shape


@pytest.mark.parametrize("images", [jnp.zeros((3, 4)), jnp.zeros((2, 4, 4, 1), jnp.uint8)])
def test_what_are_no_real_images_is_refused(images):
    with pytest.raises(ValueError, match=r"images must be real \[n, height, width, channels\]"):
        random_affines(KEY, images)


def test_support_and_queries_are_augmented_with_keys_of_their_own():
    drawn = []

    def augmentation(key, x):
        drawn.append(jax.random.key_data(key).tolist())
        return 2 * x

    def sample(key, data):
        drawn.append(jax.random.key_data(key).tolist())
        return Episode(Batch(data, jnp.eye(3)), Batch(data + 1, jnp.eye(3), jnp.arange(3) < 2))

    data = jax.random.normal(KEY, (3, 5))
    support, query = augmented(sample, augmentation)(KEY, data)
    np.testing.assert_array_equal(support.x, 2 * data)
    np.testing.assert_array_equal(query.x, 2 * (data + 1))
    np.testing.assert_array_equal(query.y, jnp.eye(3))
    np.testing.assert_array_equal(query.mask, [True, True, False])
    assert len(drawn) == 3
    assert len({str(key) for key in drawn}) == 3
