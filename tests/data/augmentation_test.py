import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.data.distortions import (
    _distort,
    affine_matrices,
    distort_affine,
    distorted_training,
)
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp

KEY = jax.random.key(0)
IDENTITY = jnp.eye(2)


def picture(height=9, width=7, channels=2):
    return jax.random.uniform(KEY, (height, width, channels))


def test_the_identity_changes_nothing():
    image = picture()
    np.testing.assert_allclose(_distort(image, IDENTITY, jnp.zeros(2)), image, atol=1e-6)


def test_a_shift_moves_right_and_down_by_its_pixels():
    image = picture()
    moved = _distort(image, IDENTITY, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(moved[1:, 2:], image[:-1, :-2], atol=1e-6)
    # The border's pixels move in.
    np.testing.assert_allclose(moved[1:, 0], image[:-1, 0], atol=1e-6)


def test_ninety_degrees_turn_the_picture_about_its_centre():
    image = picture(8, 8)
    matrix = affine_matrices(jnp.array([[90.0, 0.0, 0.0, 1.0, 1.0]]))[0]
    # Columns to the right and rows downwards: a positive angle turns clockwise.
    np.testing.assert_allclose(
        _distort(image, matrix, jnp.zeros(2)), jnp.rot90(image, -1), atol=1e-5
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


def test_every_image_has_its_own_distortion_and_some_have_none():
    image = picture(12, 12, 1)
    distorted = jax.jit(distort_affine)(KEY, jnp.tile(image, (400, 1, 1, 1)))
    assert distorted.shape == (400, 12, 12, 1)
    assert distorted.min() >= 0
    assert distorted.max() <= 1
    unchanged = (abs(distorted - image).max((1, 2, 3)) < 1e-5).mean()
    # All seven out of use: 1 in 128.
    assert 0 < unchanged < 0.03
    assert len({row.tobytes() for row in np.asarray(distorted)}) > 380


def test_shifts_stay_within_two_pixels():
    image = jnp.zeros((21, 21, 1)).at[10, 10].set(1.0)
    distorted = distort_affine(KEY, jnp.tile(image, (300, 1, 1, 1)))[..., 0]
    rows, columns = np.mgrid[:21, :21] - 10
    mass = distorted.sum((1, 2))
    for place in (rows, columns):
        mean = (distorted * place).sum((1, 2)) / mass
        assert abs(mean).max() < 2.5
        assert mean.max() > 1.5 > -1.5 > mean.min()
        assert 0.3 < (abs(mean) < 0.01).mean() < 0.7


def test_distortions_are_for_training_alone_and_differ_between_support_and_queries():
    drawn = []

    def distortion(key, x):
        drawn.append(jax.random.key_data(key).tolist())
        return 2 * x

    plain = prototypical(mlp((6, 4)))
    learner = distorted_training(plain, distortion)
    support, query = (
        Batch(jax.random.normal(key, (3, 5)), jnp.eye(3)) for key in jax.random.split(KEY)
    )
    episode = Episode(support, query)
    params, state = learner.init(KEY, episode)
    distorted = Episode(Batch(2 * support.x, support.y), Batch(2 * query.x, query.y))
    np.testing.assert_allclose(
        learner.loss(params, state, episode, KEY)[0], plain.loss(params, state, distorted, KEY)[0]
    )
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]
    adapted = learner.adapt(params, state, support, KEY, train=False)
    learner.predict(params, adapted, query.x, KEY, train=False)
    assert len(drawn) == 2
