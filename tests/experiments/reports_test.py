"""What is reported of a test, inside one process."""

import pytest

from experiments import reports, testing
from experiments.command_line import RunError
from experiments.testing import Asked
from meta_jax.core import RESERVED_METRICS
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.training.evaluation import MeanCI

CONFIG = {
    "learner": {"name": "prototypical", "network": {"name": "conv4", "normalisation": "batch"}},
    "tasks": {"name": "glyphs"},
    "run": {"ways": 5, "shots": 1, "queries": 15, "steps": 10, "seed": 3},
}


def scored(objective, **metrics):
    return testing.Tested(objective, {name: MeanCI(*score) for name, score in metrics.items()})


def test_the_result_says_what_was_asked_and_all_metrics():
    found = reports.result(
        CONFIG,
        scored(cross_entropy, accuracy=(91.23456, 0.5), loss=(0.25, 0.01)),
        Asked(),
        seconds=1.26,
    )
    assert found.record == {
        "learner": "prototypical",
        "tasks": "glyphs",
        "split": "test",
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "episodes": 1000,
        "accuracy": 91.2346,
        "ci95": 0.5,
        "normalisation": "batch",
        "transductive": True,
        "steps": 10,
        "seed": 3,
        "seconds": 1.3,
        "metrics": {"accuracy": [91.2346, 0.5], "loss": [0.25, 0.01]},
    }
    # No metric of somebody's own may have one of these names.
    assert found.record.keys() - {"accuracy"} <= RESERVED_METRICS
    assert reports.line(found) == (
        "test accuracy 91.23 % ± 0.50 (5-way 1-shot, 1000 episodes, normalisation batch)"
    )


@pytest.mark.parametrize("score", [(float("nan"), 0.0), (float("inf"), float("nan"))])
def test_a_score_that_is_not_finite_is_no_result(score):
    with pytest.raises(RunError, match=r"test mse is (nan|inf), so there is no result"):
        reports.result(CONFIG, scored(squared_error, mse=score), Asked(), seconds=0)


def test_answers_that_are_not_numbers_are_no_result_though_their_accuracy_is_one():
    metrics = {"accuracy": (0.0, 0.0), "loss": (float("nan"), float("nan"))}
    with pytest.raises(RunError, match="test loss is nan"):
        reports.result(CONFIG, scored(cross_entropy, **metrics), Asked(), seconds=0)


@pytest.mark.parametrize(
    ("mode", "few_shot", "sequence"),
    [
        ("batch", True, True),
        ("support", False, True),  # the moments of inputs yet to come
        ("running", False, False),
        ("layer", False, False),
    ],
)
def test_a_sequence_is_transductive_where_moments_are_of_its_own_inputs(mode, few_shot, sequence):
    network = {"name": "conv4", "normalisation": mode}
    config = {**CONFIG, "learner": {"name": "mann", "network": network}}
    metrics = {"accuracy": (50.0, 1.0)}
    found = reports.result(config, scored(cross_entropy, **metrics), Asked(), seconds=0)
    assert found.record["transductive"] is few_shot
    metrics |= {"instance_1": (30.0, 1.0), "instance_2": (70.0, 1.0)}
    found = reports.result(config, scored(cross_entropy, **metrics), Asked(), seconds=0)
    assert found.record["transductive"] is sequence
    assert [score.mean for score in found.tested.instances] == [30.0, 70.0]
    assert "sequences of 5 classes x 2 instances" in reports.line(found)


def test_a_learner_without_a_network_has_no_normalisation():
    config = {**CONFIG, "learner": {"name": "meta_networks"}}
    found = reports.result(config, scored(cross_entropy, accuracy=(9.0, 1.0)), Asked(), seconds=0)
    assert (found.record["normalisation"], found.record["transductive"]) == ("none", False)


def test_a_table_has_the_score_at_every_instance():
    curves = {"trained": [MeanCI(20.0, 1.0), MeanCI(90.25, 1.0)], "new": [MeanCI(1.0, 0.0)]}
    assert reports.instance_table(curves).splitlines() == [
        "instance     1     2",
        "trained   20.0  90.2",
        "new        1.0",
    ]
