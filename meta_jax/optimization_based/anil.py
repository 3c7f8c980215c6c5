"""Almost No Inner Loop (Raghu, Raghu, Bengio and Vinyals 2020, arXiv:1909.09157)."""

from meta_jax.core import MetaLearner, Network
from meta_jax.optimization_based.learner import head_only
from meta_jax.optimization_based.maml import maml


def anil(network: Network, **settings: object) -> MetaLearner:
    """`maml` whose inner loop adapts the head alone (section 4); the same settings but `mask`.

    The body is the same after adaptation, is run once for the whole inner loop and still gets its
    meta-gradient. It equals MAML with an inner learning rate of zero for the body.
    """
    return maml(network, mask=head_only, **settings)
