"""Costs of shipped classifiers: what is measured, and on which task."""

import pytest

from experiments import benchmark_costs, ledger
from meta_jax.lookup import UsageError
from meta_jax.training.trained import load

WEIGHTS = ledger.ROOT / "results" / "weights"


def test_a_learner_without_parameters_has_no_training_to_need_memory():
    found = benchmark_costs.cost(load(WEIGHTS / "nearest_neighbour_omniglot"), rounds=1)
    assert found.memory_mib == 0
    assert min(found.adapt_ms, found.query_ms) > 0


def test_a_classifier_of_all_training_classes_is_measured_as_it_was_trained():
    found = benchmark_costs.cost(load(WEIGHTS / "baseline_omniglot"), rounds=1)
    assert found.memory_mib > 2 * 4112 * 64 * 4 / 2**20  # its last layer and that one's gradient


def test_what_does_not_classify_is_refused():
    with pytest.raises(UsageError, match="few-shot tasks"):
        benchmark_costs.cost(load(WEIGHTS / "rl2_bandit_10_5"), rounds=1)


def test_weights_of_several_rows_are_measured_once():
    names = benchmark_costs.classifiers(ledger.read())
    assert len(names) == len(set(names))
    assert {"prototypical_omniglot", "relation_omniglot"} <= set(names)


def test_the_page_has_a_cost_for_every_classifier_of_the_ledger():
    assert set(benchmark_costs.read()) == set(benchmark_costs.classifiers(ledger.read()))
