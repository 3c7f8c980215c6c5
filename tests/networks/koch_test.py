import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from meta_jax.core import Batch, Episode
from meta_jax.metric_based.siamese import siamese
from meta_jax.networks.koch import koch


def test_the_pictures_sides_and_the_number_of_parameters():
    params, state = jax.eval_shape(
        koch().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 105, 105, 1), jnp.float32)
    )
    assert state == {}
    assert jax.tree.map(jnp.shape, params) == {
        "conv1": {"kernel": (10, 10, 1, 64), "bias": (64,)},
        "conv2": {"kernel": (7, 7, 64, 128), "bias": (128,)},
        "conv3": {"kernel": (4, 4, 128, 128), "bias": (128,)},
        "conv4": {"kernel": (4, 4, 128, 256), "bias": (256,)},
        "output": {"kernel": (6 * 6 * 256, 4096), "bias": (4096,)},
    }
    # With the 4096 weights and the bias of the pairwise head.
    support = Batch(jnp.zeros((2, 105, 105, 1)), jnp.eye(2))
    params, _ = jax.eval_shape(siamese(koch()).init, jax.random.key(0), Episode(support, support))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 38_951_745


def test_the_first_parameters_are_the_papers():
    params, _ = jax.jit(koch(256).init)(jax.random.key(0), jnp.zeros((1, 72, 72, 1)))
    for name, layer in params.items():
        deviation = 0.2 if name == "output" else 0.01
        assert abs(layer["kernel"].mean()) < 0.05 * deviation
        np.testing.assert_allclose(layer["kernel"].std(), deviation, rtol=0.05)
        np.testing.assert_allclose(layer["bias"].mean(), 0.5, atol=0.005)
        np.testing.assert_allclose(layer["bias"].std(), 0.01, rtol=0.3)


def test_plain_layers_make_the_network():
    network = koch(3)
    x = jax.random.uniform(jax.random.key(1), (2, 65, 67, 1))
    params, state = jax.jit(network.init)(jax.random.key(0), x)
    z, new_state = jax.jit(lambda x: network.apply(params, state, x, key=None, train=True))(x)
    assert new_state == {}
    for i in range(1, 5):
        layer = params[f"conv{i}"]
        x = lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.maximum(x + layer["bias"], 0)
        if i < 4:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    flat = x.reshape(2, -1) @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(z, 1 / (1 + np.exp(-flat)), atol=1e-5)


def test_the_whole_network_has_a_gradient_in_every_layer():
    learner = siamese(koch())
    x = (jax.random.uniform(jax.random.key(1), (2, 105, 105, 1)) < 0.1).astype(float)
    episode = Episode(Batch(x, jnp.eye(2)), Batch(x[:, ::-1], jnp.eye(2)))
    params, state = jax.eval_shape(learner.init, jax.random.key(0), episode)
    rng = np.random.default_rng(0)  # quicker than 38 million numbers of JAX without optimisations
    params = jax.tree.map(lambda p: 0.02 * rng.standard_normal(p.shape, np.float32), params)

    @jax.jit
    def largest_gradients(params):
        gradient, aux = jax.grad(learner.loss, has_aux=True)(
            params, state, episode, jax.random.key(2)
        )
        return jax.tree.map(lambda g: abs(g).max(), gradient), aux.metrics

    largest, metrics = largest_gradients(params)
    assert all(np.isfinite(leaf) for leaf in jax.tree.leaves((largest, metrics)))
    assert min(jax.tree.leaves(largest["network"])) > 0  # every layer learns


def test_an_image_that_leaves_no_place_is_refused():
    with pytest.raises(ValueError, match="64x105 pixels are too small for koch: use at least 65"):
        koch().init(jax.random.key(0), jnp.zeros((1, 64, 105, 1)))


def test_no_units_are_refused():
    with pytest.raises(ValueError, match="koch: outputs=0 must be at least 1"):
        koch(0)


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        jax.jit(koch(2).init)(jax.random.key(0), jnp.zeros((1, 65, 65, 1)))
