"""Kernel and ridge learners as users build them, for classes and for regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.core import Batch, Episode, Network
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.metric_based.kernel import KERNELS, kernel_learner
from meta_jax.metric_based.matching import matching
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.ridge import ridge
from meta_jax.networks.mlp import mlp
from meta_jax.training.outer_step import init_train_state, make_outer_step, make_run

KEY = jax.random.key(0)
# Embeddings are the inputs themselves.
IDENTITY = Network(lambda key, x: ({}, {}), lambda params, state, x, *, key, train: (x, state))
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


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_estimator_by_hand(x64, kernel, regression):
    support, query = episode()
    learner = kernel_learner(IDENTITY, kernel=kernel, bandwidth=0.7, regression=regression)
    found = answer(learner, support, query.x)
    k = np.array(
        [
            [np.exp(LOG_KERNELS[kernel](a, b) / 0.7) for b in np.asarray(support.x)]
            for a in np.asarray(query.x)
        ]
    )
    p = k @ np.asarray(support.y) / k.sum(1, keepdims=True)
    np.testing.assert_allclose(found if regression else jax.nn.softmax(found), p, atol=1e-12)


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
        (lambda: kernel_learner(IDENTITY, bandwidth=0), "bandwidth 0 is impossible"),
        (lambda: ridge(IDENTITY, penalty=-1.0), "penalty -1.0 is impossible: use a positive one"),
        (lambda: ridge(IDENTITY, scale=0), "scale 0 is impossible"),
        (lambda: ridge(IDENTITY, form="x"), "unknown form 'x': choose one of auto, primal, dual"),
    ],
)
def test_impossible_settings_are_refused(build, culprit):
    with pytest.raises(ValueError, match=culprit):
        build()


REGRESSION = {
    "gaussian": lambda network: kernel_learner(network, bandwidth=10.0, regression=True),
    "laplacian": lambda network: kernel_learner(
        network, kernel="laplacian", bandwidth=10.0, regression=True
    ),
    "cosine": lambda network: kernel_learner(
        network, kernel="cosine", bandwidth=0.1, regression=True
    ),
    "attention": lambda network: matching(network, regression=True),
    "full_context": lambda network: matching(network, full_context_steps=2, regression=True),
    "prototypes": lambda network: prototypical(network, regression=True),
    "ridge": lambda network: ridge(network, scale=1.0, regression=True),
}


@pytest.mark.parametrize("name", REGRESSION)
def test_every_head_learns_sinusoids(name):
    """From 10 points; to answer 0 everywhere costs the sinusoids' mean square, 4.2."""
    learner = REGRESSION[name](mlp((40, 40)))
    optimizer = optax.adam(3e-3)

    def sampler(key, _):
        return sample_sinusoid(key, 10, 10)

    start = init_train_state(learner, optimizer, sampler, (), seed=0)
    run = make_run(make_outer_step(learner, optimizer, sampler, task_batch=25, task_chunk=25))
    trained, _, _ = run(start, (), 400)
    keys = jax.random.split(jax.random.key(9), 200)
    episodes = jax.vmap(lambda key: sample_sinusoid(key, 10, 20))(keys)

    def error(params, episode):
        adapted = learner.adapt(params, trained.state, episode.support, KEY, train=False)
        y, _ = learner.predict(params, adapted, episode.query.x, KEY, train=False)
        return ((y - episode.query.y) ** 2).mean()

    errors = jax.jit(jax.vmap(error, (None, 0)))
    assert errors(trained.params, episodes).mean() < 2.5
