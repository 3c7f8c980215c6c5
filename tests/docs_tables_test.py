"""Tables of the site: made from the records, the best method first."""

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("docutils")

from docs._extensions import tables
from docs.extending import svm_head
from experiments.benchmark_costs import Cost


def row(name, value, *, transductive=False, metric="accuracy"):
    return {
        "row": name,
        "metric": metric,
        "value": value,
        "ci95": 0.25,
        "transductive": transductive,
        "train_minutes": 14.6,
        "weights": f"results/weights/{name.partition('/')[0]}_omniglot",
    }


def test_accuracies_are_a_row_for_each_method_and_a_column_for_each_setting():
    rows = [
        row("b/omniglot_5w1s", 90.0, transductive=True),
        row("a/omniglot_5w1s", 95.04),
        row("a/omniglot_20w1s", 80.0),
        row("c/omniglot_20w5s", 99.0),
        row("a/omniglot_sequence_2nd", 1.0, metric="instance_2"),
    ]
    head, _, *lines = tables.accuracies(rows).splitlines()
    assert head.count("-way") == 4
    assert lines == [
        "| `a` | 95.0 ± 0.2 |  | 80.0 ± 0.2 |  | one by one | 15 min |",
        "| `b` | 90.0 ± 0.2 |  |  |  | together | 15 min |",
        "| `c` |  |  |  | 99.0 ± 0.2 | one by one | 15 min |",
    ]


def test_costs_are_a_row_for_each_method_that_was_measured_the_quickest_first():
    rows = [row("a/omniglot_5w1s", 95.04), row("b/omniglot_5w1s", 90.0), row("c/omniglot_5w1s", 1)]
    rows.append(row("a/omniglot_20w1s", 80.0))
    measured = {"a_omniglot": Cost(13.5, 4.126, 0.437), "b_omniglot": Cost(2.0, 30.0, 0.05)}
    assert tables.costs(rows, measured).splitlines()[2:] == [
        "| `b` | 90.0 | 15 | 2.0 | 30 | 0.05 |",
        "| `a` | 95.0 | 15 | 13.5 | 4.13 | 0.44 |",
    ]


def test_every_learner_of_the_library_is_in_the_table_of_methods_and_no_other():
    # An extension is registered where it is defined.
    assert tables.registry.find("learner", "svm").factory.__module__ == svm_head.__name__
    table = tables.methods()
    for name in tables.registry.names("learner"):
        own = tables.registry.find("learner", name).factory.__module__.startswith("meta_jax.")
        assert (f"| `{name}` |" in table) == own
