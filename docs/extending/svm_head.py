"""A head of one's own: a multi-class support vector machine (MetaOptNet, Lee et al. 2019).

python -m experiments.train --learner=docs.extending.svm_head:svm --workdir=runs/svm
"""

import jax
import jax.numpy as jnp
import optax

import meta_jax as mj


def dual_variables(
    gram: jax.Array, y: jax.Array, mask: jax.Array | None, *, penalty: float, iterations: int
) -> jax.Array:
    """Solves the dual of Crammer and Singer (2001) by projected gradient ascent.

    It maximises sum(alpha * y) - 1/2 sum_k alpha_k' G alpha_k over the alpha with
    alpha <= C y and rows that sum to zero. All steps are differentiated.

    Args:
      gram: Inner products of the support embeddings [n, n].
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding, whose alpha is zero.
      penalty: C.
      iterations: Number of steps.

    Returns:
      alpha [n, ways].
    """
    bound = penalty * y
    step_size = 1 / (jnp.trace(gram) + 1e-6)  # the trace bounds the largest eigenvalue

    def step(alpha: jax.Array, _: None) -> tuple[jax.Array, None]:
        raised = alpha + step_size * (y - gram @ alpha)
        # With beta = C y - alpha the set is a simplex of size C.
        beta = jax.vmap(lambda row: optax.projections.projection_simplex(row, penalty))(
            bound - raised
        )
        alpha = bound - beta
        return (alpha if mask is None else jnp.where(mask[:, None], alpha, 0)), None

    return jax.lax.scan(step, jnp.zeros_like(y), length=iterations)[0]


def svm_head(*, penalty: float, scale: float, iterations: int) -> mj.heads.Head:
    """Builds a head whose logits are scale * <w_k, f(x)>, with w from the SVM on the support."""

    def fit(params: dict, z: jax.Array, y: jax.Array, mask: jax.Array | None) -> jax.Array:
        del params
        z = mj.objectives.without_padding(z, mask)
        alpha = dual_variables(z @ z.T, y, mask, penalty=penalty, iterations=iterations)
        return z.T @ alpha

    def predict(params: dict, weights: jax.Array, z: jax.Array) -> jax.Array:
        del params
        return scale * z @ weights

    return mj.heads.stateless_head(fit, predict)


@mj.registry.learner("svm", network="conv4")
def svm(
    network: mj.Network,
    *,
    objective: mj.Objective = mj.cross_entropy,
    penalty: float = 0.1,
    scale: float = 10.0,
    iterations: int = 30,
) -> mj.MetaLearner:
    """Builds a MetaOptNet learner: an SVM on learned embeddings of the support set.

    Args:
      network: Embedding network.
      objective: Objective of the tasks; it classifies.
      penalty: Penalty C of the SVM's slack.
      scale: Factor of the logits.
      iterations: Number of steps of the dual's solver.
    """
    head = svm_head(penalty=penalty, scale=scale, iterations=iterations)
    return mj.heads.metric_learner(network, head, objective)
