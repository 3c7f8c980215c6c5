import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode, cross_entropy, squared_error
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.learner import reduced
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.reptile import reptile
from tests.optimization_based.tasks import KEY, assert_trees_close, tanh_network, vectors

pytestmark = pytest.mark.usefixtures("x64")


def test_reductions_of_a_loss():
    logits, y = jnp.arange(12.0).reshape(4, 3) % 5, jnp.eye(3)[jnp.array([0, 1, 2, 2])]
    y = y.at[3].set(0)  # padding
    mean, metrics = cross_entropy(logits, y)
    for reduction, factor in {"mean": 1, "sum": 3, "class_sum": 3}.items():
        loss, same = reduced(cross_entropy, reduction)(logits, y)
        np.testing.assert_allclose(loss, factor * mean, rtol=1e-14)
        assert same == metrics
    twice = jnp.concatenate([logits[:3], logits[:3]]), jnp.concatenate([y[:3], y[:3]])
    assert float(reduced(cross_entropy, "sum")(*twice)[0] / mean) == pytest.approx(6)
    assert float(reduced(cross_entropy, "class_sum")(*twice)[0] / mean) == pytest.approx(3)
    with pytest.raises(ValueError, match="unknown reduction 'median'"):
        reduced(cross_entropy, "median")


def test_the_authors_rate_goes_with_their_reduction():
    """A sum over 3 classes with 0.4 is the mean with 1.2: finding 1 of the reproduction."""
    params, state = maml(tanh_network()).init(KEY, vectors())
    adapted = [
        maml(tanh_network(), inner_lr=rate, steps=2, reduction=reduction).adapt(
            params, state, vectors().support, KEY, train=True
        )
        for rate, reduction in ((0.4, "class_sum"), (1.2, "mean"), (0.2, "sum"))
    ]
    for other in adapted[1:]:
        assert_trees_close(other, adapted[0])


def test_any_optax_transformation_is_an_inner_optimizer():
    params, state = maml(tanh_network()).init(KEY, vectors())
    chain = optax.chain(optax.scale(-0.25), optax.trace(0.0), optax.scale(2.0))
    adapted = [
        maml(tanh_network(), steps=2, **settings).adapt(
            params, state, vectors().support, KEY, train=True
        )
        for settings in ({"inner_lr": 0.5}, {"inner_optimizer": chain})
    ]
    assert_trees_close(*adapted)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(maml, inner_lr=0.1, steps=10),
        functools.partial(first_order_maml, inner_lr=0.1, steps=10),
        functools.partial(anil, inner_lr=0.1, steps=10),
        functools.partial(boil, inner_lr=0.05, steps=20),
        functools.partial(meta_sgd, inner_lr=0.2, steps=10),
        functools.partial(maml_plus_plus, inner_lr=0.1, steps=10),
        functools.partial(imaml, inner_lr=0.1, proximity=0.1, steps=10),
        functools.partial(reptile, inner_lr=0.05, steps=10),
        functools.partial(lstm_meta_learner, steps=2, units=2),
    ],
    ids=lambda build: build.func.__name__,
)
def test_regression(build):
    x = jnp.linspace(-1, 1, 6)[:, None]
    episode = Episode(*[Batch(x, jnp.concatenate([x, 2 * x], 1))] * 2)
    learner = build(mlp((8,)), criterion=squared_error)
    params, state = learner.init(KEY, episode)
    (loss, aux), gradient = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))(
        params, state, episode, KEY
    )
    assert set(aux.metrics) == {"mse"}
    assert np.isfinite(loss)
    assert max(abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-4
    if build.func is lstm_meta_learner:  # it has to learn to descend
        return
    start = params.get("learner", params)
    hidden = jax.nn.relu(x @ start["network"]["layer1"]["kernel"])
    before = ((hidden @ start["head"]["kernel"] - episode.query.y) ** 2).mean()
    assert aux.metrics["mse"] < 0.8 * before
