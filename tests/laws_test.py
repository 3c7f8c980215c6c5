"""What every learner owes, over one table: a new method is one more row of `LEARNERS`."""

import functools
from collections.abc import Callable
from typing import NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax import registry
from meta_jax.core import (
    Batch,
    Episode,
    MetaLearner,
    Network,
    Normalisation,
    Objective,
)
from meta_jax.data.dataset import dataset_from_classes
from meta_jax.data.episodes import EpisodeSpec, sample_episode
from meta_jax.data.sinusoid import sample_sinusoid
from meta_jax.metric_based.baseline import baseline, baseline_plus_plus, simple_shot
from meta_jax.metric_based.kernel import kernel_learner
from meta_jax.metric_based.matching import matching, matching_fce
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.metric_based.r2d2 import r2d2
from meta_jax.metric_based.relation import relation
from meta_jax.metric_based.siamese import siamese
from meta_jax.model_based.in_context import in_context
from meta_jax.model_based.mann import lstm_learner, mann
from meta_jax.model_based.meta_networks import meta_networks
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.mlp import mlp
from meta_jax.networks.normalisation import init_normalisation, normalise
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.anil import anil
from meta_jax.optimization_based.boil import boil
from meta_jax.optimization_based.imaml import imaml
from meta_jax.optimization_based.learned_optimizers.estimators import truncated_gradient
from meta_jax.optimization_based.learned_optimizers.families import network_family
from meta_jax.optimization_based.learned_optimizers.learned_optimizer import learned_optimizer
from meta_jax.optimization_based.learned_optimizers.lstm import coordinatewise_lstm
from meta_jax.optimization_based.lstm_meta_learner import lstm_meta_learner
from meta_jax.optimization_based.maml import first_order_maml, maml
from meta_jax.optimization_based.maml_plus_plus import maml_plus_plus
from meta_jax.optimization_based.meta_sgd import meta_sgd
from meta_jax.optimization_based.protomaml import protomaml
from meta_jax.optimization_based.reptile import reptile
from tests.checkers import key_and_leak_checks

pytestmark = pytest.mark.usefixtures("x64")

MODES = get_args(Normalisation)


def small(mode: Normalisation = "running", *, flat: bool = True, dropout: bool = True) -> Network:
    """A layer on 2x2 patches, normalised, then dropout: all that a law can catch.

    Args:
      mode: Mode of the normalisation.
      flat: Whether the features are vectors; else maps 4x4.
      dropout: Whether features drop out in training.
    """

    def init(key, x):
        scale, state = init_normalisation(4, mode)
        return {"linear": init_linear(key, 4, 4), "normalisation": scale}, state

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        x = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4, 4, 4)
        x, state = normalise(
            params["normalisation"],
            state,
            linear(params["linear"], x),
            mode=mode,
            moments=moments,
            mask=mask,
        )
        x = jax.nn.relu(x)
        if train and dropout:
            # The same features of every row, so that padding draws nothing.
            x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape[1:]), x / 0.8, 0)
        return (x.reshape(x.shape[0], -1) if flat else x), state

    return Network(init, apply, mode)


def network(mode: Normalisation, **settings) -> Network:
    """The network above, which says what it is."""
    return registry.find("network", f"{__name__}:small").factory(mode, **settings)


def before_normalisation(path: str) -> bool:
    """Moments of the batch cancel the bias of the layer before them."""
    return "['linear']['bias']" in path or "['conv']['bias']" in path


def none(path: str) -> bool:
    return False


class Row(NamedTuple):
    """A learner and what it declares."""

    build: Callable[[Normalisation], MetaLearner]  # mode of normalisation -> learner
    mode: Normalisation = "running"  # the mode that the method trains with; 'none': has no layer
    objective: Objective = cross_entropy
    images: bool = True  # few-shot images, or sinusoids
    zero_gradient: Callable[[str], bool] = before_normalisation  # which leaves get none, by path
    least_gradient: float = 1e-7  # the largest entry of any other leaf's is above it
    any_ways: bool = True  # ways and shots may differ at test, labels are interchangeable
    support_order: bool = True  # whether the order of the support does not matter
    draws_rows: bool = False  # whether training draws an order or mini-batches of rows
    own_logits: bool = True  # whether a class's logit does not depend on the other classes
    supervised: bool = True  # whether tasks are episodes whose rows can be padding
    random_test: bool = False  # whether a test draws at random, such as a network's initial weights


def regression(build: Callable[[Network], MetaLearner]) -> Row:
    """A row on sinusoids."""
    return Row(
        lambda mode: build(mlp((8, 8))),
        mode="none",
        objective=squared_error,
        images=False,
        zero_gradient=none,
        any_ways=False,
    )


def by_gradient(method: Callable[..., MetaLearner], **settings) -> Row:
    """A row of a method whose inner loop takes two steps, and whose head has one size."""
    settings = {"steps": 2, "eval_steps": 2, **settings}
    return Row(lambda mode: method(network(mode), **settings), mode="batch", any_ways=False)


def in_one_context(reader: str, width: int = 4, **settings) -> Row:
    """A row of the learner that reads the support set in context."""
    return Row(
        lambda mode: in_context(
            network(mode), reader=reader, width=width, layers=2, heads=2, **settings
        ),
        any_ways=False,
        support_order=reader != "snail",
    )


LEARNERS = {
    "siamese": Row(lambda mode: siamese(network(mode))),
    "matching": Row(lambda mode: matching(network(mode))),
    "matching_fce": Row(
        lambda mode: matching_fce(network(mode), full_context_steps=2),
        support_order=False,
        own_logits=False,
    ),
    "relation": Row(lambda mode: relation(network(mode, flat=False), features=4), mode="batch"),
    "kernel": Row(lambda mode: kernel_learner(network(mode), bandwidth=5.0)),
    "r2d2": Row(lambda mode: r2d2(network(mode)), own_logits=False),
    "kernel_sinusoid": regression(
        lambda network: kernel_learner(network, bandwidth=5.0, objective=squared_error)
    ),
    "r2d2_sinusoid": regression(lambda network: r2d2(network, scale=1.0, objective=squared_error)),
    "prototypical_sinusoid": regression(
        lambda network: prototypical(network, objective=squared_error)
    ),
    "prototypical": Row(lambda mode: prototypical(network(mode))),
    "baseline": Row(
        lambda mode: baseline(network(mode), train_classes=3, head_steps=5, head_lr=0.5),
        own_logits=False,
    ),
    "baseline_plus_plus": Row(
        lambda mode: baseline_plus_plus(network(mode), train_classes=3, head_steps=5),
        own_logits=False,
    ),
    "simple_shot": Row(lambda mode: simple_shot(network(mode), train_classes=3)),
    "prototypical_cosine": Row(lambda mode: prototypical(network(mode), distance="cosine")),
    "maml": by_gradient(maml, inner_lr=0.4),
    "fomaml": by_gradient(first_order_maml, inner_lr=0.4),
    "anil": by_gradient(anil, inner_lr=0.4),
    "boil": by_gradient(boil, inner_lr=0.4),
    "meta_sgd": by_gradient(meta_sgd, inner_lr=0.4),
    "maml_plus_plus": by_gradient(maml_plus_plus, inner_lr=0.4, multi_step_steps=9),
    "imaml": by_gradient(imaml, inner_lr=0.1),
    "protomaml": by_gradient(protomaml, inner_lr=0.1),
    # Mini-batches in training are drawn by row; a test takes the whole support set.
    "reptile": by_gradient(reptile, inner_lr=0.01, batch_size=4, eval_batch_size=None)._replace(
        draws_rows=True
    ),
    "lstm_meta_learner": by_gradient(lstm_meta_learner, hidden_size=3)._replace(
        # The moments are those before the last update, so that they do not cancel all of a bias.
        mode="support",
        zero_gradient=none,
    ),
    "mann": Row(
        lambda mode: mann(network(mode), hidden_size=5, num_slots=4, slot_size=3, num_heads=2),
        any_ways=False,
        support_order=False,
        draws_rows=True,
    ),
    "lstm": Row(
        lambda mode: lstm_learner(network(mode), hidden_size=5),
        any_ways=False,
        support_order=False,
        draws_rows=True,
    ),
    "in_context_mean": in_one_context("mean", width=8),
    "in_context_cross_attention": in_one_context(
        "cross_attention",
        width=8,  # at 4, all units of the decoder are off for some initial weights
        label_code="equiangular",
    ),
    "in_context_target_masked": in_one_context("target_masked", label_code="equiangular"),
    "in_context_snail": in_one_context("snail"),
    "in_context_latent": in_one_context("mean", width=8, latent=3),
    "in_context_sinusoid": regression(
        lambda network: in_context(network, width=4, layers=2, heads=2, objective=squared_error)
    ),
    "meta_networks": Row(
        lambda mode: meta_networks(features=5, hidden=4, blocks=2),
        mode="none",
        least_gradient=1e-14,  # the embedding is reached through preprocessed gradients alone
        # Only a loss whose gradient is a constant sees it.
        zero_gradient=lambda path: path == "['embedding']['dense']['classifier']",
        any_ways=False,
        support_order=False,
    ),
    "learned_optimizer": Row(
        lambda mode: learned_optimizer(
            # Its test trains the network, which dropout would make random.
            network_family(network(mode, dropout=False)),
            coordinatewise_lstm((4,)),
            truncated_gradient(4, 2),
            test_steps=2,
        ),
        mode="batch",
        zero_gradient=none,
        any_ways=False,
        supervised=False,
        random_test=True,
    ),
    "maml_sinusoid": regression(
        lambda network: maml(network, inner_lr=0.01, steps=2, objective=squared_error)
    ),
}


def rows(**declared):
    """Names of the rows with these declarations."""
    return [
        name
        for name, row in LEARNERS.items()
        if all(getattr(row, field) == value for field, value in declared.items())
    ]


def modes_of(name):
    """Those to test: all, if there is normalisation at all."""
    return MODES if LEARNERS[name].mode != "none" else ("none",)


every_learner = pytest.mark.parametrize("name", LEARNERS)
every_supervised_learner = pytest.mark.parametrize("name", rows(supervised=True))
every_metric_learner = pytest.mark.parametrize("name", rows(any_ways=True))
every_mode = pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in LEARNERS for mode in modes_of(name)]
)
every_supervised_mode = pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in rows(supervised=True) for mode in modes_of(name)]
)


@functools.cache
def dataset():
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 8, 8, 1), np.uint8)
    return dataset_from_classes(list(images))


draw = jax.jit(sample_episode, static_argnums=2)


@functools.cache
def episode(name, seed=0, ways=3, shots=2, queries=2):
    key = jax.random.key(seed)
    if LEARNERS[name].images:
        return draw(key, dataset(), EpisodeSpec(ways, shots, queries))
    return sample_sinusoid(key, 6, 6)


class Built(NamedTuple):
    """A learner with parameters and moments away from the symmetric ones that it starts with."""

    learner: MetaLearner
    params: dict
    state: dict
    value_and_grad: Callable  # (params, state, episode, key), jitted
    adapt: Callable  # (params, state, support, key) -> the adapted learner at test, jitted
    program: Callable  # (params, state, support, x, mask, key) -> outputs and state at test, jitted
    traces: list[None]  # one for each compilation of the program

    def answers(self, support, x, *, mask=None, seed=1):
        return self.program(self.params, self.state, support, x, mask, jax.random.key(seed))[0]


def is_real(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def shifted(leaf):
    """A state away from its start; counters stay."""
    return np.asarray(leaf) + 0.1 if is_real(leaf) else leaf


@functools.cache
def initial(name, mode):
    """Parameters and state of a learner before training.

    Leaves that the learner has in its own mode too are those, so that few modes compile an `init`:
    no law is about initial values.
    """
    learner, own = LEARNERS[name].build(mode), LEARNERS[name].mode
    arguments = (jax.random.key(0), episode(name))
    if mode != own:
        known = dict(jax.tree_util.tree_leaves_with_path(initial(name, own)))
        wanted = jax.eval_shape(learner.init, *arguments)
        paths = jax.tree_util.tree_leaves_with_path(wanted)
        found = [known.get(path) for path, _ in paths]
        if all(
            leaf is not None and (leaf.shape, leaf.dtype) == (asked.shape, asked.dtype)
            for leaf, (_, asked) in zip(found, paths, strict=True)
        ):
            return jax.tree.unflatten(jax.tree.structure(wanted), found)
    return jax.jit(learner.init)(*arguments)


def built(name, mode=None):
    """The learner in a mode, by default its own: one for all laws, with what it has compiled."""
    return _built(name, mode or LEARNERS[name].mode)


@functools.cache
def _built(name, mode):
    learner = LEARNERS[name].build(mode)
    params, state = initial(name, mode)
    leaves, treedef = jax.tree.flatten(params)
    noise = np.random.default_rng(1)
    params = treedef.unflatten(
        [np.asarray(p) + 0.3 * noise.standard_normal(p.shape) for p in leaves]
    )
    traces = []
    # Jitted on their own they are traced once, for the laws that use the parts and for the whole.
    adapt = jax.jit(functools.partial(learner.adapt, train=False))
    predict = jax.jit(functools.partial(learner.predict, train=False))

    def program(params, state, support, x, mask, key):
        traces.append(None)
        adapt_key, predict_key = jax.random.split(key)
        adapted = adapt(params, state, support, adapt_key)
        return predict(params, adapted, x, predict_key, mask=mask)

    return Built(
        learner,
        params,
        jax.tree.map(shifted, state),
        jax.jit(jax.value_and_grad(learner.loss, has_aux=True)),
        adapt,
        jax.jit(program),
        traces,
    )


def assert_trees_close(actual, expected, atol=1e-9):
    chex.assert_trees_all_close(actual, expected, atol=atol, rtol=1e-7)


def assert_differ(a, b, by=1e-3):
    assert abs(np.asarray(a) - np.asarray(b)).max() > by


def cast(tree, dtype):
    def of_real(leaf):
        if not is_real(leaf):
            return leaf
        traced = isinstance(leaf, jax.core.Tracer)
        return (leaf if traced else np.asarray(leaf)).astype(dtype)

    return jax.tree.map(of_real, tree)


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


# ---- Training.


@every_learner
def test_loss_and_metrics_are_finite_scalars(name):
    b = built(name)
    (loss, aux), _ = b.value_and_grad(b.params, b.state, episode(name), jax.random.key(3))
    for value in (loss, *aux.metrics.values()):
        assert value.shape == ()
        assert value.dtype == jnp.float64
        assert np.isfinite(value)
    assert aux.metrics


@every_learner
def test_it_compiles_once(name):
    b = built(name)
    params, state = b.params, b.state
    for seed in range(2):
        task, key = episode(name, seed), jax.random.key(seed)
        _, state = b.program(params, state, task.support, task.query.x, None, key)
        params = jax.tree.map(lambda p: p * 0.9, params)
        if seed == 0:
            before = len(b.traces)
    assert before >= 1
    assert len(b.traces) == before


@every_learner
def test_vmap_over_tasks_equals_a_python_loop(name):
    """Losses, and gradients where a derivative is the learner's own and not JAX's."""
    b = built(name)
    function = b.value_and_grad if name == "imaml" else jax.jit(b.learner.loss)
    episodes = [episode(name, seed) for seed in range(3)]
    keys = jax.random.split(jax.random.key(4), 3)
    together = jax.jit(jax.vmap(function, (None, None, 0, 0)))(
        b.params, b.state, stack(episodes), keys
    )
    alone = [b.value_and_grad(b.params, b.state, e, k) for e, k in zip(episodes, keys, strict=True)]
    assert_trees_close(together, stack(alone if name == "imaml" else [one for one, _ in alone]))
    losses = np.asarray(jax.tree.leaves(together)[0])
    assert_differ(losses[0], losses[1], by=1e-4 * abs(losses).max())


@every_learner
def test_every_parameter_gets_a_gradient_unless_declared(name):
    b = built(name)
    _, gradient = b.value_and_grad(b.params, b.state, episode(name), jax.random.key(3))
    assert jax.tree.structure(gradient) == jax.tree.structure(b.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        path = jax.tree_util.keystr(path)
        largest = abs(np.asarray(leaf)).max()
        if LEARNERS[name].zero_gradient(path):
            assert largest < 1e-10, path
        else:
            assert largest > LEARNERS[name].least_gradient, path


@every_learner
def test_training_is_random_where_the_network_drops_out(name):
    b = built(name)
    losses = [
        b.value_and_grad(b.params, b.state, episode(name), jax.random.key(seed))[0][0]
        for seed in range(2)
    ]
    if LEARNERS[name].mode == "none":
        assert losses[0] == losses[1]
    else:  # a learned optimizer draws initial weights
        assert losses[0] != losses[1]


@every_supervised_learner
def test_evaluate_is_the_objective_of_the_answers(name):
    b, task = built(name), episode(name)
    # With the keys that `supervised_evaluate` splits, so that one compiled program serves both.
    metrics = jax.jit(b.learner.evaluate)(b.params, b.state, task, jax.random.key(1))
    loss, expected = LEARNERS[name].objective.loss(
        b.answers(task.support, task.query.x), task.query.y, None
    )
    assert_trees_close(metrics, {"loss": loss, **expected})


# ---- Types.


@every_mode
def test_structure_shapes_and_types_are_kept(name, mode):
    learner = LEARNERS[name].build(mode)
    key, dtype = jax.random.key(0), jnp.bfloat16
    task = episode(name)  # drawn, and kept for the other laws, in double precision
    with jax.enable_x64(False):
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), task)
        params, state = jax.eval_shape(learner.init, key, example)
        # Half precision is chosen by casting.
        params, state = jax.eval_shape(lambda tree: cast(tree, dtype), (params, state))
        assert {leaf.dtype for leaf in jax.tree.leaves((params, state)) if is_real(leaf)} == {
            jnp.dtype(dtype)
        }
        loss, aux = jax.eval_shape(learner.loss, params, state, example, key)
        assert loss.dtype == dtype
        chex.assert_trees_all_equal_shapes_and_dtypes(aux.state, state)
        # In training the loss has called both.
        adapt = functools.partial(learner.adapt, train=False)
        adapted = jax.eval_shape(adapt, params, state, example.support, key)
        predict = functools.partial(learner.predict, train=False)
        outputs, new_state = jax.eval_shape(predict, params, adapted, example.query.x, key)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        assert outputs.shape == example.query.y.shape
        assert outputs.dtype == dtype


@every_supervised_learner
def test_half_precision_gives_finite_answers(name):
    b = built(name)
    with jax.enable_x64(False):
        params, state, task = cast((b.params, b.state, episode(name)), "bfloat16")
        outputs, _ = jax.jit(b.program.__wrapped__)(
            params, state, task.support, task.query.x, None, jax.random.key(1)
        )
    assert outputs.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(outputs, np.float32)).all()


@every_supervised_mode
def test_a_test_is_exported_for_any_number_of_queries(name, mode):
    b, task = built(name, mode), episode(name)
    adapted = jax.eval_shape(b.adapt, b.params, b.state, task.support, jax.random.key(0))
    (m,) = jax.export.symbolic_shape("m")
    x = jax.ShapeDtypeStruct((m, *task.query.x.shape[1:]), task.query.x.dtype)

    def predict(params, adapted, x):
        return b.learner.predict(params, adapted, x, jax.random.key(0), train=False)[0]

    # What is lowered differently depends on the learner alone.
    platforms = ("cpu", "cuda", "tpu") if mode == LEARNERS[name].mode else ("cpu",)
    exported = jax.export.export(jax.jit(predict), platforms=platforms)(b.params, adapted, x)
    assert exported.out_avals[0].shape == (m, task.query.y.shape[1])


# ---- Invariances.


@pytest.mark.parametrize("name", rows(support_order=True))
def test_the_order_of_the_support_does_not_matter(name):
    support, query = episode(name)
    x, y = map(np.asarray, support[:2])
    order = np.random.default_rng(5).permutation(len(x))
    answers = built(name).answers(support, query.x)
    assert_trees_close(built(name).answers(Batch(x[order], y[order]), query.x), answers)
    # Mixed-up labels do matter.
    assert_differ(built(name).answers(Batch(x[order], y), query.x), answers)


@every_metric_learner
def test_permuted_labels_permute_the_logits(name):
    support, query = episode(name)[0], episode(name)[1]
    order = np.array([2, 0, 1])
    relabelled = Batch(support.x, np.asarray(support.y)[:, order])
    logits = np.asarray(built(name).answers(support, query.x))
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
    x, y = map(np.asarray, support[:2])
    few = y[:, 3] == 0
    fewer = b.answers(Batch(x[few], y[few, :3]), query.x)
    if LEARNERS[name].own_logits:
        assert_trees_close(fewer, logits[:, :3])
    else:
        assert_differ(fewer, logits[:, :3])


@every_mode
def test_queries_do_not_leak_into_each_other_but_in_batch_mode(name, mode):
    support, query = episode(name)
    b, x = built(name, mode), np.asarray(query.x)
    answers = b.answers(support, x)
    rows = np.eye(len(x), dtype=bool).reshape(len(x), len(x), *[1] * (x.ndim - 1))
    others = np.where(rows, 1 - x, x)
    changed = np.stack([b.answers(support, other) for other in others])
    kept = ~np.eye(len(x), dtype=bool)
    difference = abs(changed - answers)[kept].max()
    if mode == "batch":
        assert difference > 1e-2
    else:
        assert difference < 1e-10


@every_mode
def test_a_test_is_not_random(name, mode):
    support, query = episode(name)
    b = built(name, mode)
    answers = [b.answers(support, query.x, seed=seed) for seed in range(2)]
    assert answers[0].dtype == jnp.float64
    if LEARNERS[name].random_test:
        assert_differ(*answers)
    else:
        np.testing.assert_array_equal(*answers)


def padded(batch, rubbish, at):
    """A batch with rows of rubbish, and rubbish targets, from row `at` on."""
    n = rubbish.shape[0]
    parts = [
        np.insert(real, [at] * n, wrong, axis=0)
        for real, wrong in ((batch.x, rubbish), (batch.y, 1), (np.ones(len(batch.y), bool), False))
    ]
    return Batch(*parts)


@every_supervised_mode
def test_padding_changes_nothing(name, mode):
    support, query = episode(name)
    b = built(name, mode)
    # Near enough to what is asked to matter if it were seen.
    support_padded = padded(support, np.asarray(query.x)[:2], 2)
    query_padded = padded(query, np.asarray(support.x)[:1] * 2, 1)
    found = b.answers(support_padded, query_padded.x, mask=query_padded.mask)
    assert_trees_close(found[query_padded.mask], b.answers(support, query.x))
    # It would matter, were it not marked.
    unmarked = support_padded._replace(mask=np.ones_like(support_padded.mask))
    seen = b.answers(unmarked, query_padded.x, mask=query_padded.mask)
    assert_differ(seen[query_padded.mask], found[query_padded.mask], by=1e-4)


@every_supervised_learner
def test_padding_changes_no_loss_and_no_gradient(name):
    b, (support, query) = built(name), episode(name)
    support_x, query_x = np.asarray(support.x), np.asarray(query.x)

    def trained(task):
        return b.value_and_grad(b.params, b.state, task, jax.random.key(1))

    def with_rubbish(factor):
        rows = padded(support, factor * query_x[:2], len(support_x))
        return trained(Episode(rows, padded(query, factor * support_x[:1], 1)))

    first, second = with_rubbish(2), with_rubbish(1e4)
    assert_trees_close(first, second)
    if not LEARNERS[name].draws_rows:
        assert_trees_close(first, trained(episode(name)))


@every_supervised_learner
@pytest.mark.parametrize("part", ["loss", "evaluate"])
def test_queries_that_do_not_fit_are_refused(name, part):
    b, (support, query) = built(name), episode(name)
    n = len(query.x)
    wrong = [query._replace(y=query.y[:-1])]
    wrong += [query._replace(mask=m) for m in (jnp.ones((n, 1), bool), jnp.ones(1, bool))]
    wrong += [query._replace(mask=jnp.ones(n))]
    function, key = getattr(b.learner, part), jax.random.key(1)
    for bad in wrong:
        with pytest.raises(ValueError, match="query"):
            jax.eval_shape(function, b.params, b.state, Episode(support, bad), key)


@every_learner
def test_the_modes_give_different_answers(name):
    support, query = episode(name)
    answers = {mode: built(name, mode).answers(support, query.x) for mode in modes_of(name)}
    alike = {("batch", "one_at_a_time")}  # of one query; here there are six
    for first in answers:
        for second in answers:
            if first < second and (first, second) not in alike:
                assert_differ(answers[first], answers[second], by=1e-6)


# ---- Records and checkers.


@every_learner
def test_a_record_builds_the_learner_again(name):
    learner = LEARNERS[name].build(LEARNERS[name].mode)
    if not LEARNERS[name].supervised:
        pytest.skip("a learned optimizer is composed of a rule, a family and an estimator")
    again = registry.build("learner", learner.config)
    assert again.config == learner.config
    for a, b in zip(
        *(jax.eval_shape(one.init, jax.random.key(0), episode(name)) for one in (again, learner)),
        strict=True,
    ):
        chex.assert_trees_all_equal_shapes_and_dtypes(a, b)


@every_learner
def test_random_keys_are_used_once_and_nothing_leaks(name):
    learner = LEARNERS[name].build(LEARNERS[name].mode)
    task, key = episode(name), jax.random.key(0)

    def everything(key):
        init_key, loss_key, test_key = jax.random.split(key, 3)
        params, state = learner.init(init_key, task)
        gradient = jax.grad(learner.loss, has_aux=True)(params, state, task, loss_key)
        return gradient, learner.evaluate(params, state, task, test_key)

    with key_and_leak_checks():
        jax.eval_shape(jax.jit(everything), key)
