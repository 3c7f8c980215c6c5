"""The second-order meta-gradient of a Conv4 is that of PyTorch's double backward."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import Batch, Episode
from meta_jax.networks.conv4 import conv4, strided_conv4
from meta_jax.optimization_based.maml import maml

pytestmark = pytest.mark.usefixtures("x64")

# Written by maml_torch.py beside it.
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "maml_torch.npz")


def nested(prefix):
    tree = {"network": {}}
    for name in GOLDEN.files:
        first, *path = name.split("/")[-1].split(".")
        if name.startswith(f"{prefix}/") and first not in ("support", "query", "loss"):
            node = tree if first == "head" else tree["network"]
            for key in (first, *path[:-1]):
                node = node.setdefault("normalisation" if key == "batch_norm" else key, {})
            node[path[-1]] = jnp.asarray(GOLDEN[name], jnp.float64)
    return tree


@pytest.mark.parametrize("form", [conv4, strided_conv4])
def test_the_meta_gradient_is_pytorch_s(form):
    name = form.__name__
    learner = maml(form(8, normalisation="batch"), inner_lr=0.4, steps=2)
    episode = Episode(
        *(
            Batch(*(jnp.asarray(GOLDEN[f"input/{part}.{axis}"], jnp.float64) for axis in "xy"))
            for part in ("support", "query")
        )
    )
    params = {"learner": nested("input"), "rule": {}}
    _, state = jax.eval_shape(learner.init, jax.random.key(0), episode)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape), state)
    run = jax.jit(jax.value_and_grad(lambda *a: learner.loss(*a)[0]))
    value, gradient = run(params, state, episode, jax.random.key(0))
    np.testing.assert_allclose(value, GOLDEN[f"{name}/loss"], rtol=1e-8)
    wanted = nested(name)
    assert jax.tree.structure(gradient["learner"]) == jax.tree.structure(wanted)
    largest = max(abs(w).max() for w in jax.tree.leaves(wanted))
    for found, expected in zip(*map(jax.tree.leaves, (gradient["learner"], wanted)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * largest)
