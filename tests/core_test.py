"""Values that come in from Python: what is not finite, and classes that nobody can know."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.concrete import check_finite
from meta_jax.core import Batch, Episode, Tasks, check_batch, check_episode, supervised_evaluate
from meta_jax.data.arrays import dataset_from_arrays
from meta_jax.data.dataset import DataError
from meta_jax.metric_based.baseline import baseline
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.model_based.mann import mann
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.reptile import reptile
from meta_jax.training.evaluation import make_validate
from meta_jax.training.outer_step import init_train_state
from tests.small_networks import IDENTITY

KEY = jax.random.key(0)
X = np.arange(6, dtype=np.float32).reshape(3, 2)
EYE = np.eye(3, dtype=np.float32)
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def with_value(array, value, row=1):
    array = np.array(array)
    array[row, 0] = value
    return array


class TestNumbers:
    @pytest.mark.parametrize("value", BAD.values(), ids=BAD)
    @pytest.mark.parametrize(
        "kind", [np.asarray, jnp.asarray, lambda x: jnp.asarray(x, "bfloat16")]
    )
    def test_one_that_is_not_finite_is_named(self, value, kind):
        with pytest.raises(ValueError, match=r"data\['a'\] is not finite in row 1"):
            check_finite({"a": kind(with_value(X, value)), "b": kind(X)}, "data")

    def test_others_pass(self):
        halves = np.full((2, 2), 1e38, np.float32)  # whose sum is infinite
        check_finite((X, halves, np.array([2**31 - 1]), np.array(["a"]), np.zeros((0, 3))), "data")
        check_finite((jax.ShapeDtypeStruct((2,), jnp.float32), jax.random.key(0), None, 1), "data")
        jax.jit(lambda x: check_finite(x, "data"))(with_value(X, np.nan))

    def test_padding_may_hold_anything(self):
        mask = np.array([True, False, True])
        for kind in (np.asarray, jnp.asarray):
            check_finite(with_value(X, np.nan), "data", kind(mask))
            with pytest.raises(ValueError, match="row 2"):
                check_finite(with_value(with_value(X, np.nan), np.nan, row=2), "data", kind(mask))

    def test_what_lies_on_the_disk_is_not_read(self, tmp_path):
        np.save(tmp_path / "x.npy", with_value(X, np.nan))
        check_finite(np.load(tmp_path / "x.npy", mmap_mode="r"), "data")

    def test_a_batch(self):
        for batch in (Batch(with_value(X, np.nan), EYE), Batch(X, with_value(EYE, np.inf))):
            with pytest.raises(ValueError, match=r"query\.[xy] is not finite in row 1"):
                check_batch(batch, "query")


class TestClasses:
    def check(self, support, query, objective=cross_entropy, masks=(None, None)):
        batches = (
            Batch(X[: len(y)], y, mask) for y, mask in zip((support, query), masks, strict=True)
        )
        check_episode(Episode(*batches), objective)

    def test_one_without_support_is_refused_where_it_is_asked_for(self):
        with pytest.raises(ValueError, match="a query is of class 2, of which support has no exam"):
            self.check(EYE[[0, 1, 1]], EYE[[0, 2]])
        self.check(EYE[[0, 1, 1]], EYE[[0, 1]])
        self.check(EYE, EYE[[2]])

    def test_padding_is_no_example_and_asks_for_nothing(self):
        masks = (np.array([True, True, False]), None)
        with pytest.raises(ValueError, match="class 2"):
            self.check(EYE, EYE[[2]], masks=masks)
        self.check(EYE, EYE[[0, 2]], masks=(masks[0], np.array([True, False])))

    def test_real_targets_are_no_classes(self):
        self.check(EYE[[0, 1, 1]], EYE[[0, 2]], squared_error)

    def test_what_is_traced_is_not_looked_at(self):
        jax.jit(lambda y: self.check(y, EYE))(EYE[[0, 0, 0]])


# ---- Every door of a learner.


def episode(x=X, query=X, y=EYE, query_y=EYE):
    return Episode(Batch(x, y), Batch(query, query_y))


LEARNERS = {
    "prototypical": prototypical(mlp((2,))),
    "maml": maml(mlp((2,)), inner_lr=0.1),
    "mann": mann(mlp((2,)), num_slots=4, slot_size=2, hidden_size=2),
    "reptile": reptile(mlp((2,))),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_function_of_a_learner_refuses_what_is_not_finite(name):
    learner, bad = LEARNERS[name], with_value(X, np.nan)
    for call in (
        lambda: learner.evaluate({}, {}, episode(bad), KEY),
        lambda: learner.evaluate({}, {}, episode(query=bad), KEY),
        lambda: learner.adapt({}, {}, Batch(bad, EYE), KEY, train=False),
        lambda: learner.predict({}, {}, bad, KEY, train=False),
        lambda: learner.loss({}, {}, episode(query=bad), KEY),
        # Parameters that are traced do not hide the numbers of a task.
        lambda: jax.grad(lambda w: learner.loss(w, {}, episode(bad), KEY)[0])(jnp.ones(())),
    ):
        with pytest.raises(ValueError, match=r"x is not finite in row 1: repair the row or leave"):
            call()


@pytest.mark.parametrize("name", ["prototypical", "maml"])
def test_a_query_of_a_class_without_support_is_refused(name):
    learner, task = LEARNERS[name], episode(y=EYE[[0, 1, 1]])
    for function in (learner.loss, learner.evaluate):
        with pytest.raises(ValueError, match="a query is of class 2, of which support has no exam"):
            function({}, {}, task, KEY)


def test_a_test_of_ones_own_learner_is_checked_too():
    evaluate = supervised_evaluate(None, None, cross_entropy)
    with pytest.raises(ValueError, match="class 2"):
        evaluate({}, {}, episode(y=EYE[[0, 1, 1]]), KEY)


def test_a_classifier_of_all_classes_may_be_asked_for_any():
    learner = baseline(IDENTITY, train_classes=3, head_steps=1)
    task = episode(y=EYE[[0, 1, 1]])
    like = jax.eval_shape(learner.init, KEY, task)
    params, state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    assert np.isfinite(learner.loss(params, state, task, KEY)[0])


def test_examples_of_a_dataset_are_finite():
    with pytest.raises(DataError, match=r"x is not finite in row 1"):
        dataset_from_arrays(with_value(X, np.nan), [0, 0, 1])


def test_data_of_tasks_are_looked_at_before_training_and_before_validation():
    tasks = Tasks(lambda key, data: episode(data), with_value(X, np.nan), cross_entropy)
    learner = LEARNERS["prototypical"]
    with pytest.raises(ValueError, match="the tasks' data is not finite in row 1"):
        init_train_state(learner, optax.sgd(0.1), tasks, 0)
    with pytest.raises(ValueError, match="the tasks' data is not finite in row 1"):
        make_validate(learner, tasks, episodes=2)
