"""A classifier of somebody's own classes: a trained learner adapted to a labelled support set."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Array, Batch, Episode, MetaLearner, Normalisation, Objective, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import is_transductive
from meta_jax.objectives import check_kind, row_mask
from meta_jax.serving.exported import write_exported
from meta_jax.serving.inputs import InputForm, prepare
from meta_jax.shapes import shape_difference, take_rows

_CHUNK = 32  # queries answered at a time: one compiled program for any number of them
_LEAST_SUPPORT = 8  # rows that a support set is padded to at least


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An adapted learner: inputs in, probabilities of the support set's classes out.

    It is compiled at the first call, for any number of inputs. `adapt_classifier` builds it.
    """

    learner: MetaLearner
    params: PyTree
    state: PyTree
    support: Batch  # prepared inputs, one-hot labels
    adapted: PyTree
    classes: tuple[Any, ...]  # names or integers, sorted, as the labels had them
    form: InputForm
    transductive: bool = False  # whether the inputs of one call are normalised together

    def __call__(self, inputs: Any) -> np.ndarray:
        """Probabilities of the classes.

        Args:
          inputs: Images or other inputs, as `prepare` takes them; where the learner is
            transductive, the answers depend on all inputs of the call.

        Returns:
          Floats [n, classes]; each row sums to 1.

        Raises:
          UsageError: inputs that the learner cannot take.
        """
        return self._by_chunk(_probabilities, self.adapted, prepare(inputs, self.form)[0])

    def predict(self, inputs: Any) -> list[Any]:
        """The most probable class of each input, as the labels named it."""
        return [self.classes[index] for index in self(inputs).argmax(1)]

    def influence(self, inputs: Any) -> np.ndarray:
        """How much each support example speaks for each input's most probable class.

        It is the probability of that class less what remains of it when the learner is adapted
        without the example.

        Args:
          inputs: As in a call.

        Returns:
          Floats [n, support examples] in -1 to 1.
        """
        x = prepare(inputs, self.form)[0]
        support = _padded_support(self.support)
        found = self._by_chunk(_influence, (self.adapted, self.state, support), x)
        return found[:, : len(self.support.y)]

    def export(self, folder: str | os.PathLike) -> Path:
        """Writes the classifier as a program of its own, that needs JAX and flatbuffers alone.

        The folder gets `classifier.bin` (StableHLO for CPU, CUDA and TPU, any number of inputs),
        `classifier.json` (the classes, and how an input must look) and a README.

        Args:
          folder: Where to write; made if it is not there. An older export there is replaced.

        Returns:
          The folder.

        Raises:
          UsageError: the folder holds something else.
        """
        answer = functools.partial(_answer, self.learner)
        constants = (self.params, self.adapted)
        return write_exported(Path(folder), answer, constants, self.classes, self.form)

    def _by_chunk(self, program: Callable[..., Array], adapted: PyTree, x: PyTree) -> np.ndarray:
        n = len(jax.tree.leaves(x)[0])
        # Inputs that are normalised together stay together, padded to few different sizes.
        size = max(_CHUNK, 1 << (n - 1).bit_length()) if self.transductive else _CHUNK
        learner, found = _hashable(self.learner), []
        for start in range(0, n, size):
            part = _padded(take_rows(x, slice(start, start + size)), size)
            mask = np.arange(size) < n - start
            rows = program(learner, self.params, adapted, part, mask, _keys())
            found.append(np.asarray(rows)[: n - start])
        return np.concatenate(found)


def adapt_classifier(
    learner: MetaLearner,
    params: PyTree,
    state: PyTree,
    objective: Objective,
    inputs: Any,
    labels: Sequence[Any],
    *,
    form: InputForm,
    name: str = "the learner",
    normalisation: Normalisation = "none",
) -> Classifier:
    """Adapts a trained learner to a labelled support set.

    Args:
      learner: The learner.
      params, state: What it was trained to.
      objective: Objective that it was trained for; it classifies.
      inputs: Support inputs, as `prepare` takes them.
      labels: Name or integer of each input's class; at least two different ones. Classes may have
        different numbers of examples.
      form: How the learner's inputs look.
      name: Name of the learner in messages.
      normalisation: Mode of the learner's network.

    Raises:
      UsageError: inputs or labels that do not fit the learner or each other.
    """
    check_kind(objective, "classification", "a classifier")
    x, form = prepare(inputs, form)
    classes, indices = _classes(labels, len(jax.tree.leaves(x)[0]))
    support = Batch(x, np.eye(len(classes), dtype=np.float32)[indices])
    _check_ways(learner, params, state, support, name)
    adapted = _adapted(_hashable(learner), params, state, _padded_support(support), _keys()[0])
    transductive = is_transductive(normalisation)
    return Classifier(learner, params, state, support, adapted, classes, form, transductive)


def _classes(labels: Sequence[Any], inputs: int) -> tuple[tuple[Any, ...], np.ndarray]:
    """Classes, sorted, and the index among them of each of the labels, one for each input."""
    array = np.asarray(labels)
    if array.ndim == 1 and len(array) != inputs:
        raise UsageError(
            f"{inputs} inputs and {len(array)} labels were given: give one label for each"
        )
    if array.ndim != 1 or array.dtype.kind not in "iuUSb":
        raise UsageError(
            f"labels are {array.dtype}{list(array.shape)}: give one name or integer for each input"
        )
    classes, indices = np.unique(array, return_inverse=True)
    if len(classes) < 2:
        raise UsageError(f"labels name {len(classes)} class(es): give examples of at least 2")
    return tuple(classes.tolist()), indices


def _check_ways(
    learner: MetaLearner, params: PyTree, state: PyTree, support: Batch, name: str
) -> None:
    ways = support.y.shape[1]
    try:
        like = jax.eval_shape(learner.init, jax.random.key(0), Episode(support, support))
    except ValueError as error:
        raise UsageError(f"{name} cannot take this support set: {error}") from error
    difference = shape_difference((params, state), like)
    if difference:
        raise UsageError(
            f"{name} was trained for another number of classes than the {ways} given "
            f"({difference}): give as many as in training, or use a method that takes any number, "
            "such as prototypical"
        )


def _hashable(learner: MetaLearner) -> MetaLearner:
    return learner._replace(config=None)


def _keys() -> Array:
    """Keys of `adapt` and `predict`; no learner draws at random in a test."""
    return jax.random.split(jax.random.key(0))


def _padded_support(support: Batch) -> Batch:
    """A support set padded to one of few sizes, so that another example compiles nothing anew."""
    n = len(support.y)
    size = max(_LEAST_SUPPORT, 1 << (n - 1).bit_length())
    x, y = _padded((support.x, support.y), size)
    return Batch(x, y, jnp.arange(size) < n)


def _padded(tree: PyTree, size: int) -> PyTree:
    """Leaves [n, ...] with zeros up to [size, ...]."""
    return jax.tree.map(
        lambda leaf: np.pad(leaf, [(0, size - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)]), tree
    )


@functools.partial(jax.jit, static_argnums=0)
def _adapted(
    learner: MetaLearner, params: PyTree, state: PyTree, support: Batch, key: Array
) -> PyTree:
    return learner.adapt(params, state, support, key, train=False)


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(
    learner: MetaLearner, params: PyTree, adapted: PyTree, x: PyTree, mask: Array, keys: Array
) -> Array:
    outputs, _ = learner.predict(params, adapted, x, keys[1], train=False, mask=mask)
    return jax.nn.softmax(outputs)


def _answer(learner: MetaLearner, params: PyTree, adapted: PyTree, x: PyTree) -> Array:
    """Probabilities without padding, as they are exported."""
    outputs, _ = learner.predict(params, adapted, x, _keys()[1], train=False)
    return jax.nn.softmax(outputs)


@functools.partial(jax.jit, static_argnums=0)
def _influence(
    learner: MetaLearner, params: PyTree, fitted: PyTree, x: PyTree, mask: Array, keys: Array
) -> Array:
    adapted, state, support = fitted
    whole = _probabilities(learner, params, adapted, x, mask, keys)
    best = whole.argmax(1)

    def without(left_out: Array) -> Array:
        """Probability [n] of each input's best class, adapted without one example."""
        kept = row_mask(support) & (jnp.arange(support.y.shape[0]) != left_out)
        fewer = learner.adapt(params, state, support._replace(mask=kept), keys[0], train=False)
        found = _probabilities(learner, params, fewer, x, mask, keys)
        return jnp.take_along_axis(found, best[:, None], 1)[:, 0]

    rest = jax.lax.map(without, jnp.arange(support.y.shape[0]))
    return whole.max(1)[:, None] - rest.T


def form_of(config: Mapping[str, Any], example: Any) -> InputForm:
    """How a learner's inputs look, by the record of its training.

    Args:
      config: Contents of config.json.
      example: A task's shapes.

    Raises:
      UsageError: the task is no episode.
    """
    if not isinstance(example, Episode):
        raise UsageError(
            f"this learner was trained on tasks of type {type(example).__name__}, not on episodes: "
            "call its adapt and predict yourself"
        )
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), example.support.x
    )
    return InputForm(one, config["tasks"].get("preprocessing"))
