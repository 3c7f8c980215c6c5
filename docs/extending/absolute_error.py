"""A loss and a metric of one's own: the mean absolute error, minimised.

    python -m experiments.train --learner=maml --tasks=sinusoid --shots=10 --task_batch=16 \
        --tasks.objective=docs.extending.absolute_error:absolute_error --workdir=runs/mae
"""

import jax

import meta_jax as mj


def absolute_error_loss(
    outputs: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean of |outputs - y|, both [n, D], over the rows that are not padding."""
    mj.objectives.check_outputs(outputs, y)
    loss = mj.objectives.masked_mean(abs(outputs - y).mean(-1), mask)
    return loss, {"mae": loss}


absolute_error = mj.Objective(absolute_error_loss, metric="mae", maximise=False)
