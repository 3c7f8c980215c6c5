"""What every learner owes, over one table: a new method is one more row of `LEARNERS`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.core import (
    Batch,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    cross_entropy,
    squared_error,
)
from meta_jax.data.dataset import ImageDataset
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.matching import matching
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.relation import relation, relation_error
from meta_jax.metric_based.ridge import ridge
from meta_jax.metric_based.siamese import siamese
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.meta_networks import meta_networks
from meta_jax.networks.layers import conv_block, init_conv_block
from meta_jax.networks.mlp import mlp
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.learned_optimizers.estimators import truncated_gradient
from meta_jax.optimization_based.learned_optimizers.families import classification
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import learned_optimizer
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.protomaml import protomaml
from meta_jax.optimization_based.reptile import reptile

pytestmark = pytest.mark.usefixtures("x64")

MODES = ("running", "support", "batch")


def two_blocks(batch_norm: str) -> Network:
    """Conv4's two kinds of block, one of each: what it obeys, at a fraction of the compilation."""
    blocks = {"block1": (2, False), "block2": (1, True)}  # stride, pool

    def init(key, x):
        params, state = {}, {}
        for name, inputs in zip(blocks, (x.shape[-1], 4), strict=True):
            params[name], state[name] = init_conv_block(jax.random.fold_in(key, inputs), inputs, 4)
        return params, state

    def apply(params, state, x, *, key, train):
        new_state = {}
        for name, (stride, pool) in blocks.items():
            settings = {"stride": stride, "pool": pool, "batch_norm": batch_norm, "train": train}
            x, new_state[name] = conv_block(params[name], state[name], x, **settings)
        return x.reshape(x.shape[0], -1), new_state

    return Network(init, apply, batch_norm)


def maps(batch_norm: str) -> Network:
    """The first of these blocks alone, its output not flattened: 4x4 places for 8x8 pixels."""

    def init(key, x):
        return init_conv_block(key, x.shape[-1], 4)

    def apply(params, state, x, *, key, train):
        settings = {"stride": 2, "pool": False, "batch_norm": batch_norm, "train": train}
        return conv_block(params, state, x, **settings)

    return Network(init, apply, batch_norm)


def before_batch_norm(path: str) -> bool:
    """Batch norm cancels the bias of the convolution before it."""
    return "['conv']['bias']" in path


class Row(NamedTuple):
    """A learner and what it declares."""

    build: Callable[[str], MetaLearner]  # batch-norm mode -> learner
    batch_norm: str = "running"  # the mode that the method trains with; 'none' has no such layer
    criterion: Criterion = cross_entropy
    images: bool = True  # few-shot images, or sinusoids
    zero_gradient: Callable[[str], bool] = before_batch_norm  # which leaves get none, by path
    least_gradient: float = 1e-7  # the largest entry of any other leaf's is above it
    any_ways: bool = True  # ways and shots may differ at test, labels are interchangeable
    support_order: bool = True  # whether the order of the support does not matter
    own_logits: bool = True  # whether a class's logit does not depend on the other classes
    padding: bool = True  # whether all-zero rows of y are ignored


def regression(build: Callable[[Network], MetaLearner]) -> Row:
    """A row on sinusoids."""
    return Row(
        lambda mode: build(mlp((8, 8))),
        batch_norm="none",
        criterion=squared_error,
        images=False,
        zero_gradient=lambda path: False,
        any_ways=False,
        padding=False,
    )


def by_gradient(method: Callable[..., MetaLearner], **settings) -> Row:
    """A row of a method whose inner loop takes two steps, and whose head has one size."""
    settings = {"steps": 2, "eval_steps": 2, **settings}
    return Row(
        lambda mode: method(two_blocks(mode), **settings), batch_norm="batch", any_ways=False
    )


LEARNERS = {
    "siamese": Row(lambda mode: siamese(two_blocks(mode))),
    "matching": Row(lambda mode: matching(two_blocks(mode))),
    "matching_fce": Row(
        lambda mode: matching(two_blocks(mode), full_context_steps=2),
        support_order=False,
        own_logits=False,
    ),
    "relation": Row(
        lambda mode: relation(maps(mode), features=4), batch_norm="batch", criterion=relation_error
    ),
    "kernel": Row(lambda mode: kernel_learner(two_blocks(mode), bandwidth=5.0)),
    "ridge": Row(lambda mode: ridge(two_blocks(mode)), own_logits=False),
    "kernel_sinusoid": regression(
        lambda network: kernel_learner(network, bandwidth=5.0, regression=True)
    ),
    "ridge_sinusoid": regression(lambda network: ridge(network, scale=1.0, regression=True)),
    "prototypical": Row(lambda mode: prototypical(two_blocks(mode))),
    "prototypical_cosine": Row(lambda mode: prototypical(two_blocks(mode), distance="cosine")),
    "maml": by_gradient(maml, inner_lr=0.4),
    "fomaml": by_gradient(first_order_maml, inner_lr=0.4),
    "anil": by_gradient(anil, inner_lr=0.4),
    "boil": by_gradient(boil, inner_lr=0.4),
    "meta_sgd": by_gradient(meta_sgd, inner_lr=0.4),
    "maml_plus_plus": by_gradient(maml_plus_plus, inner_lr=0.4, multi_step_steps=9),
    "imaml": by_gradient(imaml, inner_lr=0.1),
    "protomaml": by_gradient(protomaml, inner_lr=0.1),
    # Mini-batches are drawn by row, whatever stands there.
    "reptile": by_gradient(reptile, batch_size=4, eval_batch_size=4)._replace(
        support_order=False, padding=False
    ),
    "lstm_meta_learner": by_gradient(lstm_meta_learner, units=3)._replace(
        # The statistics are those before the last update, so that they do not cancel all of a bias.
        batch_norm="support",
        zero_gradient=lambda path: False,
    ),
    "mann": Row(
        lambda mode: mann(two_blocks(mode), units=5, slots=4, width=3, heads=2),
        any_ways=False,
        support_order=False,
    ),
    "lstm": Row(
        lambda mode: lstm_learner(two_blocks(mode), units=5), any_ways=False, support_order=False
    ),
    "meta_networks": Row(
        lambda mode: meta_networks(3, hidden=3),
        batch_norm="none",
        least_gradient=1e-14,  # the embedding is reached through preprocessed gradients alone
        # Only a loss whose gradient is a constant sees it.
        zero_gradient=lambda path: path == "['embedding']['dense']['classifier']",
        any_ways=False,
        support_order=False,
    ),
    "learned_optimizer": Row(
        lambda mode: learned_optimizer(
            classification(two_blocks(mode), ways=3, minibatch=None),
            coordinatewise_lstm((4,)),
            truncated_gradient(4, 2),
            test_steps=2,
        ),
        batch_norm="batch",
        zero_gradient=lambda path: False,
        any_ways=False,
        padding=False,
    ),
    "maml_sinusoid": Row(
        lambda mode: maml(mlp((8, 8)), inner_lr=0.01, steps=2, criterion=squared_error),
        batch_norm="none",
        criterion=squared_error,
        images=False,
        zero_gradient=lambda path: False,
        any_ways=False,
        padding=False,
    ),
}


def rows(**declared):
    """Names of the rows with these declarations."""
    return [
        name
        for name, row in LEARNERS.items()
        if all(getattr(row, field) == value for field, value in declared.items())
    ]


every_learner = pytest.mark.parametrize("name", LEARNERS)
every_batch_normed_learner = pytest.mark.parametrize(
    "name", [name for name, row in LEARNERS.items() if row.batch_norm != "none"]
)
every_metric_learner = pytest.mark.parametrize("name", rows(any_ways=True))


@functools.cache
def dataset():
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 8, 8, 1), np.uint8)
    return ImageDataset(jnp.asarray(images), jnp.full(8, 6, jnp.int32), jnp.zeros(8, jnp.int32))


draw = jax.jit(sample_episode, static_argnums=2)


@functools.cache
def episode(name, seed=0, ways=3, shots=2, queries=2):
    key = jax.random.key(seed)
    if LEARNERS[name].images:
        return draw(key, dataset(), EpisodeSpec(ways, shots, queries))
    return sample_sinusoid(key, 6, 6)


class Built(NamedTuple):
    """A learner with parameters and statistics away from the symmetric ones that it starts with."""

    learner: MetaLearner
    params: dict
    state: dict
    value_and_grad: Callable  # (params, state, episode, key), jitted
    adapt: Callable  # (params, state, support, key) at test, jitted
    predict: Callable  # (params, adapted, x, key) at test, jitted: outputs and state
    traces: list[str]  # 'adapt' and 'predict', one for each compilation

    def answers(self, support, x):
        adapted = self.adapt(self.params, self.state, support, jax.random.key(1))
        return self.predict(self.params, adapted, x, jax.random.key(2))[0]


@functools.cache
def built(name, mode=None):
    learner = LEARNERS[name].build(mode or LEARNERS[name].batch_norm)
    params, state = jax.jit(learner.init)(jax.random.key(0), episode(name))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = treedef.unflatten(
        [p + 0.3 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    )
    traces = []

    def traced(name, *arguments):
        traces.append(name)
        return getattr(learner, name)(*arguments, train=False)

    return Built(
        learner,
        params,
        jax.tree.map(lambda s: s + jnp.asarray(0.1, s.dtype), state),
        jax.jit(jax.value_and_grad(learner.loss, has_aux=True)),
        jax.jit(functools.partial(traced, "adapt")),
        jax.jit(functools.partial(traced, "predict")),
        traces,
    )


def assert_trees_close(actual, expected, atol=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected)


def assert_differ(a, b, by=1e-3):
    assert abs(np.asarray(a) - np.asarray(b)).max() > by


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@every_learner
def test_loss_and_metrics_are_finite_scalars(name):
    b = built(name)
    (loss, aux), _ = b.value_and_grad(b.params, b.state, episode(name), jax.random.key(3))
    for value in (loss, *aux.metrics.values()):
        assert value.shape == ()
        assert np.isfinite(value)
    assert loss > 0
    assert aux.metrics


@every_learner
def test_it_compiles_once(name):
    b = built(name)
    params, state = b.params, b.state
    for seed in range(2):
        task, key = episode(name, seed), jax.random.key(seed)
        adapted = b.adapt(params, state, task.support, key)
        _, state = b.predict(params, adapted, task.query.x, key)
        params = jax.tree.map(lambda p: p * 0.9, params)
        if seed == 0:
            before = list(b.traces)
    assert {"adapt", "predict"} == set(before)
    assert b.traces == before


@every_learner
def test_vmap_over_tasks_equals_a_python_loop(name):
    b = built(name)
    episodes = [episode(name, seed) for seed in range(3)]
    keys = jax.random.split(jax.random.key(4), 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *episodes)
    together = jax.jit(jax.vmap(b.value_and_grad, (None, None, 0, 0)))(
        b.params, b.state, stacked, keys
    )
    alone = [b.value_and_grad(b.params, b.state, e, k) for e, k in zip(episodes, keys, strict=True)]
    assert_trees_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))
    losses = together[0][0]
    assert_differ(losses[0], losses[1], by=1e-4 * abs(losses).max())


@every_learner
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_state_keeps_its_structure_shapes_and_types(name, mode, dtype):
    learner = LEARNERS[name].build(mode)
    key = jax.random.key(0)
    task = episode(name)  # drawn, and kept for the other laws, in double precision
    with jax.enable_x64(dtype == "float64"):
        example = jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), task)
        params, state = jax.eval_shape(learner.init, key, example)
        leaves = jax.tree.leaves((params, state))
        # Counters are whole numbers.
        real = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        assert real == {jnp.dtype(dtype)}
        loss, aux = jax.eval_shape(learner.loss, params, state, example, key)
        assert loss.dtype == dtype
        assert shapes(aux.state) == shapes(state)
        for train in (True, False):
            adapted = jax.eval_shape(
                functools.partial(learner.adapt, train=train), params, state, example.support, key
            )
            outputs, new_state = jax.eval_shape(
                functools.partial(learner.predict, train=train),
                params,
                adapted,
                example.query.x,
                key,
            )
            assert shapes(new_state) == shapes(state)
            assert outputs.shape == example.query.y.shape
            assert outputs.dtype == dtype


@every_learner
def test_every_parameter_gets_a_gradient_unless_declared(name):
    b = built(name)
    _, gradient = b.value_and_grad(b.params, b.state, episode(name), jax.random.key(3))
    assert jax.tree.structure(gradient) == jax.tree.structure(b.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        path = jax.tree_util.keystr(path)
        largest = abs(leaf).max()
        if LEARNERS[name].zero_gradient(path):
            assert largest < 1e-10, path
        else:
            assert largest > LEARNERS[name].least_gradient, path


@pytest.mark.parametrize("name", rows(support_order=True))
def test_the_order_of_the_support_does_not_matter(name):
    support, query = episode(name)
    order = jax.random.permutation(jax.random.key(5), support.x.shape[0])
    shuffled = Batch(support.x[order], support.y[order])
    answers = built(name).answers(support, query.x)
    assert_trees_close(built(name).answers(shuffled, query.x), answers)
    # Mixed-up labels do matter.
    assert_differ(built(name).answers(Batch(support.x[order], support.y), query.x), answers)


@every_metric_learner
def test_permuted_labels_permute_the_logits(name):
    support, query = episode(name)
    order = np.array([2, 0, 1])
    relabelled = Batch(support.x, support.y[:, order])
    logits = built(name).answers(support, query.x)
    assert_trees_close(built(name).answers(relabelled, query.x), logits[:, order])
    assert_differ(logits, logits[:, order])


@every_metric_learner
def test_ways_and_shots_may_differ_at_test(name):
    support, query = episode(name, seed=1, ways=4, shots=1, queries=3)
    b = built(name, "running")
    logits = b.answers(support, query.x)
    assert logits.shape == (12, 4)
    assert np.isfinite(logits).all()
    # Where a class's logit is its own, the others' are unchanged without the last class.
    few = support.y[:, 3] == 0
    fewer = b.answers(Batch(support.x[few], support.y[few, :3]), query.x)
    if LEARNERS[name].own_logits:
        assert_trees_close(fewer, logits[:, :3])
    else:
        assert_differ(fewer, logits[:, :3])


def leak(b, support, x):
    """The largest difference between a query's answers in two companies."""
    answers = b.answers(support, x)
    others = [x.at[i].set(1 - x[i]) for i in range(len(x))]
    changed = np.stack([b.answers(support, other) for other in others])
    kept = ~np.eye(len(x), dtype=bool)
    return abs(changed - answers)[kept].max()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, row in LEARNERS.items()
        for mode in (MODES if row.batch_norm != "none" else ("none",))
    ],
)
def test_queries_do_not_leak_into_each_other_but_in_batch_mode(name, mode):
    support, query = episode(name)
    difference = leak(built(name, mode), support, query.x)
    if mode == "batch":
        assert difference > 1e-2
    else:
        assert difference < 1e-10


@every_batch_normed_learner
def test_the_batch_norm_modes_give_different_answers(name):
    support, query = episode(name)
    running, of_support, batch = (built(name, m).answers(support, query.x) for m in MODES)
    assert_differ(running, of_support)
    assert_differ(running, batch)
    assert_differ(of_support, batch)


@pytest.mark.parametrize("name", rows(padding=True))
def test_padding_changes_nothing(name):
    support, query = episode(name)
    rubbish = query.x[:2]  # near enough to what is asked to matter where it has a label
    padded = Batch(
        jnp.concatenate([support.x[:2], rubbish, support.x[2:]]),
        jnp.concatenate([support.y[:2], jnp.zeros((2, 3)), support.y[2:]]),
    )
    b = built(name, "running")
    answers = b.answers(support, query.x)
    assert_trees_close(b.answers(padded, query.x), answers)
    labelled = padded._replace(y=padded.y.at[2:4, 0].set(1))
    assert_differ(b.answers(labelled, query.x), answers, by=1e-4)


@pytest.mark.parametrize("name", rows(padding=True))
def test_padded_queries_do_not_count(name):
    criterion = LEARNERS[name].criterion
    support, query = episode(name)
    logits = built(name).answers(support, query.x)
    padded = (
        jnp.concatenate([logits, jnp.full((2, 3), 7.0)]),
        jnp.concatenate([query.y, jnp.zeros((2, 3))]),
    )
    assert_trees_close(criterion(*padded), criterion(logits, query.y))


@every_learner
def test_every_row_is_an_episode_of_its_own_kind(name):
    assert isinstance(episode(name), Episode)
    assert isinstance(built(name).learner, MetaLearner)
