"""Adjoints: how the outer gradient comes back through an inner loop."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from meta_jax.core import PyTree


def _identity(x: PyTree) -> PyTree:
    return x


class Adjoint(NamedTuple):
    """Two hooks of the inner loop, orthogonal to the update rule."""

    gradient: Callable[[PyTree], PyTree]  # what the update rule sees of the inner gradient
    step: Callable[[Callable], Callable]  # how one inner step is wrapped


# Back-propagation through every step, all intermediate values kept.
UNROLLED = Adjoint(_identity, _identity)
# Inner gradients are constants (Finn et al. 2017, section 5.2): no second derivatives.
FIRST_ORDER = Adjoint(jax.lax.stop_gradient, _identity)
# As unrolled, but a step is recomputed in the backward pass: memory of one step, not of all.
CHECKPOINTED = Adjoint(_identity, lambda step: jax.checkpoint(step, prevent_cse=False))

ADJOINTS = {"unrolled": UNROLLED, "first_order": FIRST_ORDER, "checkpointed": CHECKPOINTED}
