"""What the adapters of foreign networks share: switches, trees of parameters, masks."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from meta_jax.core import Array, MomentsUse, Normalisation, PyTree, check_mask
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import BATCH_MODES, check_mode

ADAPTER_MODES: tuple[Normalisation, ...] = ("none", *BATCH_MODES)
# Names under which functions take the switch of their randomness.
_TRAINING = ("train", "training", "is_training", "is_train", "train_mode", "enable_dropout")
_TESTING = ("deterministic", "inference", "is_inference", "eval", "evaluation", "testing")
_STORED = ("use_running_average", "use_running_averages", "use_running_stats")


def find_switches(
    function: Callable[..., Any],
    what: str,
    *,
    inputs: int,
    handled: Iterable[str] = (),
    declared: Mapping[str, bool] | None = None,
) -> Callable[[bool, MomentsUse], dict[str, bool]]:
    """How a function is told of training: (train, moments) -> keyword arguments.

    Args:
      function: The function, bound.
      what: Name of the file's contents in messages.
      inputs: Number of its first parameters that are given by position.
      handled: Further parameters, which the caller gives by keyword.
      declared: By name, the value in training of switches that have names of their own; the
        opposite is given in tests.

    Raises:
      UsageError: a parameter that must be given, or that has a truth value by default, and whose
        meaning is not known: it would be left as it is in silence.
    """
    declared = dict(declared or {})
    parameters = list(inspect.signature(function).parameters.values())
    if missing := set(declared) - {parameter.name for parameter in parameters}:
        raise UsageError(f"{what} has no parameter '{missing.pop()}': correct the switches")
    known = {*_TRAINING, *_TESTING, *_STORED, *handled, *declared}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters[inputs:]:
        if parameter.name in known or parameter.kind in variadic:
            continue
        needed = parameter.default is inspect.Parameter.empty
        if needed or isinstance(parameter.default, bool):
            raise UsageError(
                f"{what} takes '{parameter.name}', and whether it follows training is not known: "
                f"call it one of {', '.join((*_TRAINING, *_TESTING, *_STORED))}, say its value in "
                f"training with switches={{'{parameter.name}': True}}, or bind it beforehand"
            )
    taken = {parameter.name for parameter in parameters[inputs:]}

    def switches(train: bool, moments: MomentsUse) -> dict[str, bool]:
        found = dict.fromkeys(taken.intersection(_TRAINING), train)
        found |= dict.fromkeys(taken.intersection(_TESTING), not train)
        found |= dict.fromkeys(taken.intersection(_STORED), moments == "stored")
        return found | {name: value == train for name, value in declared.items()}

    return switches


def resolve_mode(
    normalisation: Normalisation | None, has_batch_norm: bool, what: str
) -> Normalisation:
    """The mode of a foreign network; by default 'running' where it has batch norm, else 'none'.

    Raises:
      UsageError: a mode that foreign networks do not have, or that needs a batch norm.
    """
    if normalisation is None:
        return "running" if has_batch_norm else "none"
    check_mode(normalisation, ADAPTER_MODES)
    if normalisation != "none" and not has_batch_norm:
        raise UsageError(
            f"{what} has no batch norm, and normalisation='{normalisation}' asks for its moments: "
            "leave normalisation out"
        )
    return normalisation


def split_tree(tree: Mapping[str, Any], prefixes: Iterable[tuple[str, ...]]) -> PyTree:
    """Parameters as {'weights': ..., 'normalisation': ...}, either only where it is not empty.

    Args:
      tree: Nested dictionaries of parameters.
      prefixes: Paths of the normalisation layers.

    Examples:
      >>> split_tree({"norm": {"scale": 1}, "dense": {"kernel": 2}}, [("norm",)])
      {'weights': {'dense': {'kernel': 2}}, 'normalisation': {'norm': {'scale': 1}}}
    """
    prefixes = list(prefixes)
    parts: dict[str, dict] = {"weights": {}, "normalisation": {}}
    for path, leaf in flat_items(tree):
        of_norm = any(path[: len(prefix)] == prefix for prefix in prefixes)
        _insert(parts["normalisation" if of_norm else "weights"], path, leaf)
    return {name: part for name, part in parts.items() if part}


def merge_tree(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_tree`."""
    merged: dict[str, Any] = {}
    for part in ("weights", "normalisation"):
        for path, leaf in flat_items(parts.get(part, {})):
            _insert(merged, path, leaf)
    return merged


def flat_items(tree: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Any]]:
    """Paths and values of nested dictionaries."""
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += [((key, *path), leaf) for path, leaf in flat_items(value)]
        else:
            found.append(((key,), value))
    return found


def nested(items: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Nested dictionaries from paths and values, the inverse of `flat_items`."""
    tree: dict[str, Any] = {}
    for path, leaf in items:
        _insert(tree, path, leaf)
    return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def keep_types(new: PyTree, old: PyTree) -> PyTree:
    """A new state in the types of the old one: batch norms keep float32 beside bfloat16."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


def rows_mask(mask: Array | None, x: Array, what: str) -> Array | None:
    """A mask of rows [n] that broadcasts to a batch norm's inputs [n, ...].

    Raises:
      ValueError: the inputs have another number of rows, or the mask is not bool [n].
    """
    if mask is None:
        return None
    check_mask(mask, len(mask))
    if x.shape[0] != mask.shape[0]:
        raise ValueError(
            f"a batch norm of {what} sees {x.shape[0]} rows, and the batch has {mask.shape[0]}: "
            "padding cannot be kept out of its moments; give batches without a mask"
        )
    return mask.reshape(-1, *[1] * (x.ndim - 1))


def joint_mask(mask: Array | None, own: Array | None) -> Array | None:
    """What both a batch's mask and a module's own mask let through."""
    if mask is None or own is None:
        return own if mask is None else mask
    return mask & own


def finite_mask(mask: Array | None) -> tuple[Array | None, Array | None]:
    """A mask whose moments are finite, all True where nothing is real, and whether anything is.

    Args:
      mask: From `joint_mask`; where nothing in it is real, the moments must not be kept.

    Returns:
      The mask, and a boolean scalar; None and None without a mask.
    """
    if mask is None:
        return None, None
    real = mask.any()
    return mask | ~real, real
