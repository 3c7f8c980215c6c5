"""The door through which flax NNX modules enter."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.adapters import (
    find_switches,
    finite_mask,
    flat_items,
    joint_mask,
    keep_types,
    merge_tree,
    nested,
    resolve_mode,
    rows_mask,
    split_tree,
)
from meta_jax.networks.normalisation import Moments, check_moments

if TYPE_CHECKING:  # a module needs nothing of flax but itself, so `import meta_jax` stays quick
    from flax import nnx


def from_nnx(
    build: Callable[["nnx.Rngs"], "nnx.Module"],
    *,
    normalisation: Normalisation | None = None,
    switches: Mapping[str, bool] | None = None,
) -> Network:
    """Builds a network from a function that builds a flax NNX module.

    Dropout follows `train`, and `nnx.BatchNorm` the moments that are asked for, whatever the module
    itself says of them. Parameters, the module's `nnx.Param`, are {'weights', 'normalisation'}, the
    latter those of batch, layer, group, instance and RMS norms, each in the module's own structure;
    every other variable but random keys is the network's state. Running averages take in moments
    at the rate of the module's `momentum`.

    Args:
      build: Function from `nnx.Rngs` to a module, which is called on one input, an array [n, ...]
        or a pytree of them. Where its `__call__` takes a switch (`train`, `training`,
        `deterministic`, `use_running_average` and the like) or `rngs`, it gets it.
      normalisation: Mode of its batch norm: 'batch', 'running', 'support' or 'one_at_a_time', or
        'none', which keeps the moments that it has; if None, 'running' where the module has batch
        norm and 'none' elsewhere.
      switches: By name, the value in training of parameters of `__call__` that follow training
        under names of their own.

    Returns:
      The network; the module's randomness draws from the `key` given to `apply`.

    Raises:
      UsageError: `build` gives no NNX module, a mode that the module cannot have, or a parameter of
        `__call__` whose meaning is not known.

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> network = from_nnx(lambda rngs: nnx.Linear(5, 3, rngs=rngs))
      >>> params, state = network.init(jax.random.key(0), jnp.ones((2, 5)))
      >>> network.apply(params, state, jnp.ones((2, 5)), key=None, train=True)[0].shape
      (2, 3)
    """
    from flax import nnx

    _check_build(build)
    template = nnx.eval_shape(lambda: _built(build, nnx.Rngs(0)))
    what = f"the NNX module {type(template).__name__}"
    modules = [(path, module) for path, module in nnx.iter_modules(template)]
    has_batch_norm = any(isinstance(module, nnx.BatchNorm) for _, module in modules)
    mode = resolve_mode(normalisation, has_batch_norm, what)
    call = find_switches(template.__call__, what, inputs=1, handled=("rngs",), declared=switches)
    kinds = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm)
    norms = tuple(_as_names(path) for path, module in modules if isinstance(module, kinds))
    adapter = _Adapter(build, template, norms, call, what)
    return Network(partial(_init, adapter), partial(_apply, adapter), mode)


def _check_build(build: Any) -> None:
    """Refuses modules, which can be called too, where a function that builds one is needed."""
    import flax.linen as nn
    from flax import nnx

    name = type(build).__name__
    if isinstance(build, nnx.Module) or not callable(build):
        raise UsageError(
            f"from_nnx needs a function that builds the module, not a {name}: give lambda rngs: "
            f"{name if isinstance(build, nnx.Module) else 'MyModule'}(..., rngs=rngs)"
        )
    linen = build if isinstance(build, type) else type(build)
    if issubclass(linen, nn.Module):
        raise UsageError(f"{linen.__name__} is a flax Linen module: wrap it with from_linen")


def _built(build: Callable[["nnx.Rngs"], "nnx.Module"], rngs: "nnx.Rngs") -> "nnx.Module":
    from flax import nnx

    module = build(rngs)
    if not isinstance(module, nnx.Module):
        raise UsageError(
            f"from_nnx needs a function that returns an NNX module, not a {type(module).__name__}: "
            "give lambda rngs: MyModule(..., rngs=rngs)"
        )
    return module


class _Adapter(NamedTuple):
    """A module without its numbers, and how it is called."""

    build: Callable[["nnx.Rngs"], "nnx.Module"]
    template: "nnx.Module"
    norms: tuple[tuple[str, ...], ...]  # paths of its normalisation layers
    switches: Callable[[bool, MomentsUse], dict[str, bool]]
    name: str

    def split(self, module: "nnx.Module") -> tuple[Any, Any, Any, Any]:
        """The module's structure, parameters, random keys and other variables."""
        from flax import nnx

        graph, params, rngs, state = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graph, params, rngs, state


def _init(adapter: _Adapter, key: Array, x: PyTree) -> tuple[PyTree, PyTree]:
    del x  # a module knows its sizes
    from flax import nnx

    _, params, _, state = adapter.split(adapter.build(nnx.Rngs(key)))
    return split_tree(_as_tree(params), adapter.norms), _as_tree(state)


def _apply(
    adapter: _Adapter,
    params: PyTree,
    state: PyTree,
    x: PyTree,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    from flax import nnx

    check_moments(moments)
    graph, params_like, rngs_like, state_like = adapter.split(adapter.template)
    own_key, call_key = (None, None) if key is None else jax.random.split(key)
    module = nnx.merge(
        graph,
        _filled(params_like, merge_tree(params)),
        _seeded(rngs_like, own_key, train, adapter.name),
        _filled(state_like, state),
    )
    _take_control(module, train=train, moments=moments, mask=mask, name=adapter.name)
    settings: dict[str, Any] = adapter.switches(train, moments)
    if call_key is not None and "rngs" in inspect.signature(module.__call__).parameters:
        settings["rngs"] = nnx.Rngs(call_key)
    y = module(x, **settings)
    if not train and moments in ("stored", "batch"):
        return y, state
    new_state = _as_tree(adapter.split(module)[3])
    return y, keep_types(new_state, state)


# ---- Variables as plain trees of arrays: nested dictionaries whose keys are strings.


def _as_names(path: tuple) -> tuple[str, ...]:
    return tuple(str(key) for key in path)


def _as_tree(variables: "nnx.State") -> PyTree:
    return nested((_as_names(path), variable.get_value()) for path, variable in _places(variables))


def _places(variables: "nnx.State") -> list[tuple[tuple, "nnx.Variable"]]:
    from flax import nnx

    return list(nnx.to_flat_state(variables))


def _filled(variables: "nnx.State", tree: PyTree) -> "nnx.State":
    """Variables of the same places with the values of a tree."""
    from flax import nnx

    values = dict(flat_items(tree))
    return nnx.from_flat_state(
        [(path, variable.replace(values[_as_names(path)])) for path, variable in _places(variables)]
    )


def _seeded(variables: "nnx.State", key: Array | None, train: bool, name: str) -> "nnx.State":
    """Random keys of a module, drawn from one."""
    from flax import nnx

    places = _places(variables)
    if places and key is None and train:
        raise ValueError(f"{name} draws random numbers while training: give apply a key")
    if key is None:
        key = jax.random.key(0)  # in tests nothing draws from it
    found = []
    for i, (path, variable) in enumerate(places):
        like = variable.get_value()
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            value = jax.random.fold_in(key, i)
            value = jax.random.split(value, like.shape) if like.shape else value
        else:
            value = jnp.zeros(like.shape, like.dtype)  # how often a key was drawn from
        found.append((path, variable.replace(value)))
    return nnx.from_flat_state(found)


# ---- Batch norm and dropout.


def _take_control(
    module: "nnx.Module", *, train: bool, moments: MomentsUse, mask: Array | None, name: str
) -> None:
    """Makes batch norms use the moments asked for, and dropout follow `train`."""
    from flax import nnx

    module.set_attributes(
        deterministic=not train,
        use_running_average=moments == "stored",
        raise_if_not_found=False,
    )
    for _, part in list(nnx.iter_modules(module)):
        if isinstance(part, nnx.BatchNorm):
            _override(part, _batch_norm(moments, mask, name))
        elif isinstance(part, nnx.Dropout | nnx.MultiHeadAttention):
            _override(part, _dropout(train))


def _batch_norm(moments: MomentsUse, rows: Array | None, name: str) -> Callable[..., Array]:
    def call(
        part: Any,
        plain: Callable[..., Array],
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Array:
        del use_running_average
        if moments == "stored":
            return plain(x, use_running_average=True)
        old = Moments(part.mean.get_value(), part.var.get_value())
        mask, real = finite_mask(joint_mask(rows_mask(rows, x, name), mask))
        batch = _moments(part, x, mask)
        # NNX lets no gradient through its running averages; those of a support set need it. So the
        # module is given the batch's moments as if they were stored.
        _store(part, batch)
        y = plain(x, use_running_average=True)
        kept = _kept(old, batch, moments, part.momentum)
        if real is not None:
            kept = Moments(*(jnp.where(real, k, o) for k, o in zip(kept, old, strict=True)))
        _store(part, kept)
        return y

    return call


def _store(part: "nnx.BatchNorm", moments: Moments) -> None:
    for variable, value in zip((part.mean, part.var), moments, strict=True):
        variable.set_value(value.astype(variable.get_value().dtype))


def _kept(old: Moments, batch: Moments, moments: MomentsUse, momentum: float) -> Moments:
    """The moments that stay behind: those there were, the batch's, or a running average."""
    share = {"batch": 0.0, "replace": 1.0}.get(moments, 1 - momentum)
    if share in (0.0, 1.0):
        return batch if share else old
    return Moments(*((1 - share) * o + share * b for o, b in zip(old, batch, strict=True)))


def _moments(part: "nnx.BatchNorm", x: Array, mask: Array | None) -> Moments:
    """Mean and variance of a batch norm's inputs over all axes but its own."""
    own = part.axis if isinstance(part.axis, tuple | list) else (part.axis,)
    axes = tuple(i for i in range(x.ndim) if i not in [axis % x.ndim for axis in own])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes, where=mask, keepdims=True)
    var = jnp.square(x - mean).mean(axes, where=mask)
    mean = mean.squeeze(axes)
    if part.axis_name is None:
        return Moments(mean, var)
    whole = jax.lax.pmean(mean, part.axis_name)
    return Moments(whole, jax.lax.pmean(var + jnp.square(mean - whole), part.axis_name))


def _dropout(train: bool) -> Callable[..., Array]:
    def call(
        part: Any,
        plain: Callable[..., Array],
        *args: Any,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Array:
        given = part.deterministic if deterministic is None else deterministic
        return plain(*args, deterministic=not train or bool(given), **kwargs)

    return call


def _override(part: "nnx.Module", call: Callable[..., Array]) -> None:
    """Replaces the call of one module, by a class of its own: Python looks calls up there."""
    kind = type(part)

    def controlled(self: Any, *args: Any, **kwargs: Any) -> Array:
        return call(self, partial(kind.__call__, self), *args, **kwargs)

    object.__setattr__(part, "__class__", type(kind.__name__, (kind,), {"__call__": controlled}))
