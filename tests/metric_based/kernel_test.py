"""Kernel and R2-D2 learners as users build them, for classes and for regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.lookup import UsageError
from meta_jax.metric_based.kernel import KERNELS, kernel_learner
from meta_jax.metric_based.matching import matching, matching_fce
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.r2d2 import r2d2
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from tests.small_networks import IDENTITY

KEY = jax.random.key(0)
LOG_KERNELS = {
    "gaussian": lambda a, b: -((a - b) ** 2).sum(),
    "laplacian": lambda a, b: -abs(a - b).sum(),
    "cosine": lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
}


def episode(shots=2):
    keys = jax.random.split(KEY, 2)
    sets = []
    for key, n in zip(keys, (shots, 2), strict=True):
        sets.append(Batch(jax.random.normal(key, (3 * n, 4)), jnp.tile(jnp.eye(3), (n, 1))))
    return Episode(*sets)


def answer(learner, support, x):
    params, state = learner.init(KEY, Episode(support, support))
    adapted = learner.adapt(params, state, support, KEY, train=False)
    return learner.predict(params, adapted, x, KEY, train=False)[0]


@pytest.mark.parametrize("objective", [cross_entropy, squared_error], ids=lambda o: o.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_estimator_by_hand(x64, kernel, objective):
    support, query = episode()
    learner = kernel_learner(IDENTITY, kernel=kernel, bandwidth=0.7, objective=objective)
    found = answer(learner, support, query.x)
    k = np.array(
        [
            [np.exp(LOG_KERNELS[kernel](a, b) / 0.7) for b in np.asarray(support.x)]
            for a in np.asarray(query.x)
        ]
    )
    p = k @ np.asarray(support.y) / k.sum(1, keepdims=True)
    if objective is cross_entropy:
        found = jax.nn.softmax(found)
    np.testing.assert_allclose(found, p, atol=1e-12)


def test_one_shot_of_the_gaussian_kernel_is_a_prototypical_network(x64):
    support, query = episode(shots=1)
    np.testing.assert_allclose(
        answer(kernel_learner(IDENTITY), support, query.x),
        answer(prototypical(IDENTITY), support, query.x),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (lambda: kernel_learner(IDENTITY, kernel="x"), "unknown kernel 'x': choose one of gauss"),
        (lambda: kernel_learner(IDENTITY, bandwidth=0), "bandwidth=0 must be greater than 0"),
        (lambda: r2d2(IDENTITY, penalty=-1.0), "penalty=-1.0 must be greater than 0"),
        (lambda: r2d2(IDENTITY, scale=0), "scale=0 must be greater than 0"),
        (lambda: r2d2(IDENTITY, form="x"), "unknown form 'x': choose one of auto, primal, dual"),
    ],
)
def test_impossible_settings_are_refused(build, culprit):
    with pytest.raises(UsageError, match=culprit):
        build()


def test_the_scale_follows_the_objective():
    for objective, scale in ((cross_entropy, 10.0), (squared_error, 1.0)):
        learner = r2d2(IDENTITY, objective=objective)
        assert learner.config["scale"] == scale
        params, _ = learner.init(KEY, episode())
        np.testing.assert_allclose(jnp.exp(params["head"]["log_scale"]), scale, rtol=1e-6)
    assert r2d2(IDENTITY, objective=squared_error, scale=3.0).config["scale"] == 3.0


def sinusoids(key, shots):
    """Support and queries of Finn et al. (2017): amplitude in [0.1, 5], phase in [0, pi]."""
    amplitude_key, phase_key, *keys = jax.random.split(key, 4)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5)
    phase = jax.random.uniform(phase_key, maxval=jnp.pi)
    x = [jax.random.uniform(k, (shots, 1), minval=-5, maxval=5) for k in keys]
    return Episode(*(Batch(x, amplitude * jnp.sin(x - phase)) for x in x))


# With their own defaults, but for the kernels: all learn.
REGRESSION = {
    "gaussian": kernel_learner,
    "laplacian": lambda network, **given: kernel_learner(network, kernel="laplacian", **given),
    "cosine": lambda network, **given: kernel_learner(network, kernel="cosine", **given),
    "attention": matching,
    "full_context": matching_fce,
    "prototypes": prototypical,
    "r2d2": r2d2,
}


@pytest.mark.parametrize("name", REGRESSION)
def test_every_head_learns_sinusoids(name):
    """From 10 points; to answer 0 everywhere costs the sinusoids' mean square, 4.2."""
    learner = REGRESSION[name](mlp((40, 40)), objective=squared_error)
    optimizer = optax.adam(3e-3)
    start, state = jax.jit(lambda key: learner.init(key, sinusoids(key, 10)))(KEY)
    steps = {"cosine": 600, "prototypes": 600, "full_context": 100}.get(name, 300)

    def mean_loss(params, key):
        keys = jax.random.split(key, (2, 25))
        episodes = jax.vmap(lambda key: sinusoids(key, 10))(keys[0])
        losses, _ = jax.vmap(learner.loss, (None, None, 0, 0))(params, state, episodes, keys[1])
        return losses.mean()

    def step(carry, key):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(mean_loss)(params, key), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def error_after_training(key):
        train_key, test_key = jax.random.split(key)
        keys = jax.random.split(train_key, steps)
        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
        keys = jax.random.split(test_key, (2, 200))
        episodes = jax.vmap(lambda key: sinusoids(key, 20))(keys[0])
        # Ten of the points to learn from.
        support = jax.tree.map(lambda a: a[:, :10], episodes.support)
        episodes = Episode(support, episodes.query)
        return jax.vmap(learner.evaluate, (None, None, 0, 0))(params, state, episodes, keys[1])

    assert error_after_training(KEY)["mse"].mean() < 2.5
