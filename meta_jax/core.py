"""The one abstraction of meta_jax: a task meets a learner, a meta-learner adapts it.

A learner f_theta meets a task; a meta-learner g turns the task's support set S into an adapted
learner theta' = g(theta, S); training maximises what the adapted learner says of the query set B:

    max  E_tasks E_{S,B} [ sum_{(x, y) in B} log P_{g(theta, S)}(y | x) ]

Every method is an `adapt` (how S is absorbed) and a `predict` (how x is answered). All functions
are pure and written for ONE task, without a task axis: the outer loop maps them over tasks.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.concrete import check_finite, is_concrete
from meta_jax.lookup import UsageError

Array = jax.Array
PyTree = Any
Metrics = dict[str, Array]  # scalars by name
Config = Mapping[str, Any]  # a component's name and its settings, in what JSON can hold

Normalisation = Literal[
    "none", "batch", "running", "support", "one_at_a_time", "layer", "instance", "tasknorm"
]
# Which moments a normalisation layer uses: 'stored', those in the state; 'batch', those of the
# inputs at hand, the state unchanged; 'update', the same, and the state's running averages take
# them in; 'replace', the same, and they become the state. See `meta_jax.networks.normalisation`.
MomentsUse = Literal["stored", "batch", "update", "replace"]


class Batch(NamedTuple):
    """Labelled examples.

    Attributes:
      x: Inputs, leaves [n, ...].
      y: Targets, leaves [n, ...]: one-hot labels [n, ways], or real targets [n, D].
      mask: Mask of the rows, bool [n], False for padding; None where every row is real.
    """

    x: PyTree
    y: PyTree
    mask: Array | None = None


def check_mask(mask: Array, rows: int, name: str = "mask") -> None:
    """Refuses a mask that is not bool [rows]: another one broadcasts, or weighs, in silence.

    Args:
      mask: The mask.
      rows: Number of rows that it belongs to.
      name: Its name in messages.

    Raises:
      ValueError: the mask has another shape or type.
    """
    shape, dtype = jnp.shape(mask), str(getattr(mask, "dtype", type(mask).__name__))
    if shape != (rows,) or dtype != "bool":
        raise ValueError(
            f"{name} must be bool [{rows}], one entry for each row, False for padding, not "
            f"{dtype}{list(shape)}"
        )


def check_batch(batch: Batch, name: str) -> None:
    """Refuses a batch whose inputs, targets and mask differ in their number of rows.

    Outside of `jit`, where numbers are at hand, they must be finite too, but for padding.

    Args:
      batch: The batch.
      name: Its name in messages, such as 'support'.

    Raises:
      ValueError: the numbers of rows differ, there is no row, the mask is not bool [n], or an input
        or a target is NaN or infinite.
    """
    sizes = {
        f"{part}{jax.tree_util.keystr(path)}": leaf.shape[0] if jnp.ndim(leaf) else None
        for part, tree in zip(("x", "y", "mask"), batch, strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values() or None in sizes.values():
        found = ", ".join(f"{part} {size}" for part, size in sizes.items())
        raise ValueError(f"{name} needs the same number of rows, at least one, in: {found}")
    if batch.mask is not None:
        check_mask(batch.mask, batch.mask.shape[0], f"the mask of {name}")
    check_finite(batch.x, f"{name}.x", batch.mask)
    check_finite(batch.y, f"{name}.y", batch.mask)


class Episode(NamedTuple):
    """One task of supervised learning.

    Attributes:
      support: What is learned from.
      query: What is asked.
    """

    support: Batch
    query: Batch


class ObjectiveLoss(Protocol):
    """(outputs, y, mask) -> (scalar loss, metrics)."""

    def __call__(self, outputs: PyTree, y: PyTree, mask: Array | None, /) -> tuple[Array, Metrics]:
        """Mean over the rows that are not padding."""
        ...


def check_episode(episode: Episode, objective: "Objective | None" = None) -> None:
    """Refuses an episode whose queries have another form than its support set.

    Args:
      episode: The episode.
      objective: What is asked of it: where that is a class, it must have a support example, which
        outside of `jit` is checked; None where a class may be new.

    Raises:
      ValueError: a batch is not what `check_batch` asks for, the examples or the targets of the two
        differ in structure or shape, or a query is of a class without support.
    """
    forms = []
    for name, batch in zip(Episode._fields, episode, strict=True):
        check_batch(batch, name)
        forms.append(jax.tree.map(lambda leaf: tuple(leaf.shape[1:]), (batch.x, batch.y)))
    for part, support, query in zip(("x", "y"), *forms, strict=True):
        if support != query:
            remedy = ": turn labels into one-hot ones of the same ways" if part == "y" else ""
            raise ValueError(
                f"{part} of each example must have one shape in an episode, but for support it is "
                f"{support}, and for query {query}{remedy}"
            )
    if objective is not None and objective.kind == "classification":
        _check_classes(episode)


def _check_classes(episode: Episode) -> None:
    """Refuses a query of a class without support, which no method can answer."""
    found = []
    for x, y, mask in episode:
        del x
        known = [is_concrete(leaf) for leaf in jax.tree.leaves((y, mask))]
        if not all(known) or jnp.ndim(y) != 2:
            return
        real = np.asarray(y) if mask is None else np.asarray(y)[np.asarray(mask)]
        found.append((real != 0).any(0))
    missing = np.flatnonzero(found[1] & ~found[0])
    if missing.size:
        raise ValueError(
            f"a query is of class {missing[0]}, of which support has no example: give one, or "
            "leave the query out"
        )


class Objective(NamedTuple):
    """What is asked of the outputs, and what is better.

    Attributes:
      loss: Function (outputs, y, mask) -> (scalar loss, metrics).
      metric: Metric that selects a model and is reported: a name among the metrics, or 'loss'.
      maximise: Whether more of the metric is better.
      kind: Kind of the tasks: 'classification' where targets are one-hot labels [n, ways],
        'regression' where they are real, 'control' where actions earn rewards.
      unit: '%' for a share, which is reported in per cent; otherwise empty.
      name: Name in records and flags: one of meta_jax, or 'package.module:attribute'.
      outputs: Form of the outputs that the loss takes: 'array' for logits or means [n, ...],
        'gaussian' for a `meta_jax.objectives.Gaussian`.
    """

    loss: ObjectiveLoss
    metric: str
    maximise: bool
    kind: Literal["classification", "regression", "control"] = "regression"
    unit: Literal["", "%"] = ""
    name: str = ""
    outputs: Literal["array", "gaussian"] = "array"


class Sample(Protocol):
    """(key, data) -> a task."""

    def __call__(self, key: Array, data: PyTree, /) -> Any:
        """Draws one task: an `Episode`, or whatever the learner understands."""
        ...


class Tasks(NamedTuple):
    """A distribution of tasks.

    Attributes:
      sample: Function (key, data) -> a task, pure and jittable.
      data: What `sample` draws from, passed as an argument so that it is not compiled in.
      objective: What is asked of the answers.
      exact_answers: By name, functions (key, data) -> (task, outputs) that draw the task that
        `sample` draws, and know its best answers: what a result is compared with.
      batch: Function (key, data) -> an ordinary batch, an `Episode` of as many examples, labelled
        among all classes of the data; None where tasks have none.
    """

    sample: Sample
    data: PyTree
    objective: Objective
    exact_answers: Mapping[str, Sample] = {}
    batch: Sample | None = None


class LossAux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      state: The new non-differentiated state (running statistics), its structure unchanged.
      metrics: Scalars by name.
    """

    state: PyTree
    metrics: Metrics


class NetworkInit(Protocol):
    """(key, x) -> (params, state)."""

    def __call__(self, key: Array, x: PyTree, /) -> tuple[PyTree, PyTree]:
        """Initial parameters and state for inputs like x, leaves [n, ...]."""
        ...


class NetworkApply(Protocol):
    """(params, state, x, *, key, train, moments, mask) -> (y, state)."""

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        x: PyTree,
        /,
        *,
        key: Array | None,
        train: bool,
        moments: MomentsUse = "stored",
        mask: Array | None = None,
    ) -> tuple[Array, PyTree]:
        """Outputs [n, ...] and the new state; padding (mask False) never enters a moment."""
        ...


class Network(NamedTuple):
    """A pure embedding network.

    Attributes:
      init: Function (key, x) -> (params, state); the state is `{}`, or holds moments of
        normalisation layers.
      apply: Function (params, state, x, *, key, train, moments, mask) -> (y, state); `train`
        switches dropout and the like, and nothing else.
      normalisation: Mode of its normalisation: see `meta_jax.networks.normalisation`.
      config: Name and settings of the network, where a registered factory built it.
    """

    init: NetworkInit
    apply: NetworkApply
    normalisation: Normalisation = "none"
    config: Config | None = None


class Init(Protocol):
    """(key, task) -> (params, state)."""

    def __call__(self, key: Array, task: Any, /) -> tuple[PyTree, PyTree]:
        """Initial parameters and state, sized by an example of a task."""
        ...


class Adapt(Protocol):
    """(params, state, support, key, *, train) -> adapted."""

    def __call__(
        self, params: PyTree, state: PyTree, support: Any, key: Array, /, *, train: bool
    ) -> Any:
        """Absorbs a support set."""
        ...


class Predict(Protocol):
    """(params, adapted, x, key, *, train, mask) -> (outputs, state)."""

    def __call__(
        self,
        params: PyTree,
        adapted: Any,
        x: PyTree,
        key: Array,
        /,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Answers queries x, leaves [m, ...]; mask, bool [m], is False for padding."""
        ...


class Loss(Protocol):
    """(params, state, task, key) -> (scalar, LossAux)."""

    def __call__(
        self, params: PyTree, state: PyTree, task: Any, key: Array, /
    ) -> tuple[Array, LossAux]:
        """What training minimises."""
        ...


class Evaluate(Protocol):
    """(params, state, task, key) -> metrics."""

    def __call__(self, params: PyTree, state: PyTree, task: Any, key: Array, /) -> Metrics:
        """What a test measures on one task."""
        ...


class Update(Protocol):
    """(optimizer, sample, params, state, opt_state, data, keys, *, mesh) -> what a step changes."""

    def __call__(
        self,
        optimizer: Any,
        sample: Sample,
        params: PyTree,
        state: PyTree,
        opt_state: PyTree,
        data: PyTree,
        keys: Array,
        /,
        *,
        mesh: Any = None,
    ) -> tuple[PyTree, PyTree, PyTree, Metrics]:
        """Parameters, state, the optimizer's state and metrics after an outer step.

        `keys` [task_batch] has a random key for each task; `mesh` shares them among devices.
        """
        ...


class MetaLearner(NamedTuple):
    """A meta-learning method, as pure functions of one task.

    `train` is True while meta-training and False when a learner is tested. A state's real leaves
    are averaged over the tasks of an outer step; integer leaves are counters and are not.

    Attributes:
      init: Function (key, task) -> (params, state), sized by an example of a task.
      adapt: Function (params, state, support, key, *, train) -> adapted.
      predict: Function (params, adapted, x, key, *, train, mask) -> (outputs, state).
      loss: Function (params, state, task, key) -> (scalar, LossAux), what training minimises.
      evaluate: Function (params, state, task, key) -> metrics of a test on one task.
      state_scope: 'shared' for one state of all tasks, 'task' for one state of each task.
      config: Name and settings of the learner, where a registered factory built it.
      update: What an outer step does, where it is not one update by the gradient of the mean loss
        over the tasks.
      updates_per_step: Number of updates of the optimizer in an outer step.
    """

    init: Init
    adapt: Adapt
    predict: Predict
    loss: Loss
    evaluate: Evaluate
    state_scope: Literal["shared", "task"] = "shared"
    config: Config | None = None
    update: Update | None = None
    updates_per_step: int = 1


# What a run says of itself beside the metrics, in lines of metrics and in the record of a result.
RESERVED_METRICS = frozenset(
    {
        "loss",
        "gradient_norm",
        "step",
        "split",
        "learner",
        "tasks",
        "ways",
        "shots",
        "queries",
        "episodes",
        "ci95",
        "normalisation",
        "transductive",
        "with_precision",
        "steps",
        "seed",
        "seconds",
        "metrics",
    }
)


def check_metrics(names: Iterable[str]) -> None:
    """Refuses metrics that would hide what a run writes under the same name.

    Args:
      names: Names of the metrics that an objective or a learner gives beside the loss.

    Raises:
      UsageError: one of them is in `RESERVED_METRICS`.
    """
    for name in sorted(RESERVED_METRICS.intersection(names)):
        raise UsageError(
            f"a metric is called '{name}', a name under which a run writes something else: rename "
            "it in the objective, or in the learner's loss"
        )


def with_loss(loss: Array, metrics: Metrics) -> Metrics:
    """The metrics of a task with its loss among them, as 'loss'.

    Raises:
      UsageError: a metric has a name of `RESERVED_METRICS`.
    """
    check_metrics(metrics)
    return {"loss": loss, **metrics}


def supervised_loss(adapt: Adapt, predict: Predict, objective: Objective) -> Loss:
    """Builds the default loss of a `MetaLearner`: objective(predict(adapt(S), B))."""

    def loss(params: PyTree, state: PyTree, task: Episode, key: Array) -> tuple[Array, LossAux]:
        adapt_key, predict_key = jax.random.split(key)
        support, (x, y, mask) = task
        check_episode(task, objective)
        adapted = adapt(params, state, support, adapt_key, train=True)
        outputs, state = predict(params, adapted, x, predict_key, train=True, mask=mask)
        value, metrics = objective.loss(outputs, y, mask)
        return value, LossAux(state, metrics)

    return loss


def supervised_evaluate(adapt: Adapt, predict: Predict, objective: Objective) -> Evaluate:
    """Builds the default test of a `MetaLearner`: the objective's loss and metrics on B.

    Where every query is padding nothing is measured: all metrics are NaN.
    """

    return SupervisedEvaluate(adapt, predict, objective)


@dataclasses.dataclass(frozen=True)
class SupervisedEvaluate:
    """The test that `supervised_evaluate` builds.

    Attributes:
      adapt, predict: Those of the learner.
      objective: What is asked.
    """

    adapt: Adapt
    predict: Predict
    objective: Objective

    def check(self, task: Episode) -> None:
        """Refuses a task as `check_episode` does."""
        check_episode(task, self.objective)

    def __call__(self, params: PyTree, state: PyTree, task: Episode, key: Array, /) -> Metrics:
        """The objective's loss and metrics on the queries."""
        adapt_key, predict_key = jax.random.split(key)
        support, (x, y, mask) = task
        self.check(task)
        adapted = self.adapt(params, state, support, adapt_key, train=False)
        outputs, _ = self.predict(params, adapted, x, predict_key, train=False, mask=mask)
        loss, metrics = self.objective.loss(outputs, y, mask)
        measured = with_loss(loss, metrics)
        if mask is None:
            return measured
        # A mean over nothing is 0, the best mean squared error that there is.
        return {name: jnp.where(mask.any(), value, jnp.nan) for name, value in measured.items()}
