"""Embeddings that are computed again: the same values, less memory in an inner loop."""

import jax
import numpy as np

from meta_jax.core import Batch, Episode
from meta_jax.networks.rematerialised import rematerialised
from meta_jax.optimization_based.maml import maml
from tests.small_networks import normalised


def test_an_inner_loop_has_the_same_gradient_in_less_memory():
    rng = np.random.default_rng(0)
    y = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 40)]
    batches = (Batch(rng.normal(size=(40, 8, 8, 2)).astype(np.float32), y) for _ in range(2))
    episode, key = Episode(*batches), jax.random.key(0)
    gradients, taken = [], []
    for network in (normalised("layer", 6), rematerialised(normalised("layer", 6))):
        learner = maml(network, inner_lr=0.1, steps=4)
        params, state = jax.jit(learner.init)(key, episode)
        gradient = jax.jit(jax.grad(lambda *given, loss=learner.loss: loss(*given)[0]))
        compiled = gradient.lower(params, state, episode, key).compile()
        gradients.append(compiled(params, state, episode, key))
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)
    assert taken[1] < 0.9 * taken[0]
