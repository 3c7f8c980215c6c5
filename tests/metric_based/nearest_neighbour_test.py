import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Batch
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour


def test_logits_are_minus_the_distance_to_the_nearest_of_each_class():
    # Class 0 at 0 and 10, class 1 at 4; the padded row at 9 belongs to no class.
    support = Batch(
        jnp.array([[[0.0]], [[4.0]], [[10.0]], [[9.0]]]),
        jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]),
    )
    learner, key = nearest_neighbour(), jax.random.key(0)
    adapted = learner.adapt({}, {}, support, key, train=False)
    logits, state = learner.predict({}, adapted, jnp.array([[[1.0]], [[8.0]]]), key, train=False)
    np.testing.assert_array_equal(logits, [[-1.0, -9.0], [-4.0, -16.0]])
    assert state == {}
