"""Networks in bfloat16: near to float32, while all that is trained or kept stays float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax import registry
from meta_jax.core import Batch, Episode, Tasks
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.model_based.in_context import in_context
from meta_jax.networks.conv4 import conv4
from meta_jax.networks.linen import from_linen
from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import normalise
from meta_jax.networks.resnet12 import resnet12
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.maml import maml
from meta_jax.precision import record_precision, with_precision
from meta_jax.reinforcement.maml_rl import maml_rl
from meta_jax.training.outer_step import init_train_state, make_outer_step
from tests.small_networks import mixed_inputs, normalised

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 1)).astype(np.float32)
VECTORS = IMAGES[:, 0, :4, 0]


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.relu(x))


NETWORKS = {
    "mlp": (mlp((5, 3)), VECTORS),
    "conv4": (conv4(4), IMAGES),
    "conv4_layer": (conv4(4, normalisation="layer"), IMAGES),
    "conv4_tasknorm": (conv4(4, normalisation="tasknorm"), IMAGES),
    "resnet12": (resnet12((4, 5)), IMAGES),
    "linen": (from_linen(Flax(), normalisation="running"), VECTORS),
    "tokens": (mixed_inputs(), {"ids": np.eye(3, dtype=np.int32), "real": np.ones((3, 3))}),
}


def types(tree):
    return jax.tree.map(lambda leaf: str(leaf.dtype), tree)


def products(jaxpr):
    """Types of the operands of all matrix products and convolutions."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append({str(variable.aval.dtype) for variable in equation.invars})
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                found += products(inner.jaxpr)
    return found


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("moments", ["stored", "replace"])
def test_a_network_takes_and_gives_what_it_did(name, moments):
    network, x = NETWORKS[name]
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf), x)
    half = with_precision(network, "bfloat16")
    like = jax.eval_shape(network.init, KEY, x)
    assert types(jax.eval_shape(half.init, KEY, x)) == types(like)

    def apply(network, params, state, x):
        return network.apply(params, state, x, key=KEY, train=False, moments=moments)

    ours, theirs = (
        jax.eval_shape(functools.partial(apply, each), *like, x) for each in (half, network)
    )
    assert types(ours) == types(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@pytest.mark.parametrize("name", ["mlp", "linen"])
def test_every_product_is_of_bfloat16(name):
    network, x = NETWORKS[name]
    like = jax.eval_shape(network.init, KEY, x)
    half = with_precision(network, "bfloat16").apply
    apply = functools.partial(half, key=None, train=False, moments="batch")
    found = products(jax.make_jaxpr(apply)(*like, x).jaxpr)
    assert found == [{"bfloat16"}, {"bfloat16"}]


def test_outputs_are_those_of_rounded_numbers():
    network, kernel = with_precision(mlp((1,)), "bfloat16"), np.full((3, 1), 1 + 2**-9, np.float32)
    params = {"layer1": {"kernel": kernel, "bias": np.zeros(1, np.float32)}}
    y, _ = network.apply(params, {}, jnp.eye(3), key=None, train=False)
    np.testing.assert_array_equal(y, np.ones((3, 1)))


def test_a_block_in_bfloat16_is_near_to_one_in_float32():
    network = normalised("running", features=4)
    x = 3 + IMAGES.reshape(3, 8, 8, 4)

    def all_of(params, state, x):
        found = {}
        for precision in ("float32", "bfloat16"):
            apply = with_precision(network, precision).apply
            call = functools.partial(apply, key=None, train=True, moments="update")
            gradient = jax.grad(lambda p, call=call: (call(p, state, x)[0] ** 2).sum())(params)
            found[precision] = (call(params, state, x), gradient)
        return found

    found = jax.jit(all_of)(*network.init(KEY, x), x)
    exact, half = found["float32"], found["bfloat16"]
    assert types(exact) == types(half)
    for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(half), strict=True):
        np.testing.assert_allclose(other, one, atol=0.06 * np.abs(one).max())
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (exact, half)), strict=True))


def test_moments_are_not_rounded():
    """In bfloat16, numbers from 256 on are even; so are sums of them."""
    x = jnp.array([[256.0], [258.0]], jnp.bfloat16)
    params = {"scale": jnp.ones(1, jnp.bfloat16), "offset": jnp.zeros(1, jnp.bfloat16)}
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    y, new = normalise(params, stats, x, mode="batch", moments="replace")
    assert y.dtype == jnp.bfloat16 and y.astype(float).ravel().tolist() == [-1, 1]
    assert types(new) == types(stats)
    assert (float(new["mean"][0]), float(new["var"][0])) == (257, 1)


def episode(y):
    return Episode(Batch(VECTORS, y), Batch(VECTORS + 0.1, y))


LEARNERS = {
    "prototypical": (prototypical, cross_entropy, np.eye(3, dtype=np.float32)),
    "maml": (functools.partial(maml, inner_lr=0.1), cross_entropy, np.eye(3, dtype=np.float32)),
    "in_context": (
        functools.partial(in_context, width=4, layers=1, heads=1),
        squared_error,
        VECTORS[:, :1],
    ),
}


def built(name):
    build, objective, y = LEARNERS[name]
    learner = build(with_precision(mlp((4,)), "bfloat16"), objective=objective)
    return learner, Tasks(lambda key, data: episode(data), jnp.asarray(y), objective)


def navigator():
    tasks = load_source("navigation", horizon=3).tasks("train", EpisodeSize(1, 1, 1), train=True)
    return maml_rl(with_precision(mlp((4,)), "bfloat16"), trajectories=2), tasks


@pytest.mark.parametrize("name", [*LEARNERS, "maml_rl"])
def test_a_learner_of_each_family_trains_with_everything_in_float32(name):
    learner, tasks = built(name) if name in LEARNERS else navigator()
    optimizer = optax.adam(0.1)
    before = jax.eval_shape(lambda: init_train_state(learner, optimizer, tasks, 0))
    step = make_outer_step(learner, optimizer, tasks.sample, task_batch=2)
    after, metrics = jax.eval_shape(step, before, tasks.data)
    assert types(after) == types(before)
    real = [leaf for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {str(leaf.dtype) for leaf in (*real, *metrics.values())} == {"float32"}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_gradient_is_one_of_descent(name):
    learner, tasks = built(name)
    task = episode(tasks.data)
    params, state = learner.init(KEY, task)

    @jax.jit
    def step(params):
        (loss, _), gradient = jax.value_and_grad(learner.loss, has_aux=True)(
            params, state, task, KEY
        )
        return loss, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    losses = []
    for _ in range(5):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


class TestItsRecord:
    def test_it_is_with_the_network_and_builds_the_same(self):
        learner = prototypical(with_precision(mlp((4,)), "bfloat16"))
        assert learner.config["network"]["with_precision"] == "bfloat16"
        again = registry.build("learner", learner.config)
        assert again.config == learner.config
        task = episode(np.eye(3, dtype=np.float32))
        adapt = functools.partial(again.adapt, train=False)
        like = jax.eval_shape(again.init, KEY, task)
        assert "bf16" in str(jax.make_jaxpr(adapt)(*like, task.support, KEY))

    def test_float32_is_not_recorded_and_takes_back_another(self):
        network = mlp((4,))
        assert with_precision(network, "float32") == network
        back = with_precision(with_precision(network, "bfloat16"), "float32")
        assert back == network
        assert record_precision({"name": "mlp", "with_precision": "bfloat16"}, "float32") == {
            "name": "mlp"
        }

    @pytest.mark.parametrize("precision", ["float16", "bf16", "", None])
    def test_others_are_refused(self, precision):
        with pytest.raises(UsageError, match=r"unknown precision.*float32, bfloat16"):
            with_precision(mlp(), precision)
