"""A trained learner in a folder that says all about itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax import registry
from meta_jax.core import Batch, Episode, Network, Tasks
from meta_jax.lookup import UsageError
from meta_jax.metric_based.nearest_neighbour import nearest_neighbour
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.conv4 import conv4
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.precision import with_precision
from meta_jax.training import checkpoints
from meta_jax.training.checkpoints import CheckpointError
from meta_jax.training.loop import LoopConfig, fit
from meta_jax.training.optimizers import average_params, averaged_params
from meta_jax.training.outer_step import init_train_state, make_outer_step
from meta_jax.training.record import (
    describe_task,
    make_config,
    read_config,
    write_config,
)
from meta_jax.training.train_loop import make_train_loop
from meta_jax.training.trained import (
    Trained,
    load,
    load_parameters,
    load_pretrained,
    pretrained_names,
    save_trained,
)

OWN = "own_components"  # a module beside this one


def episode(key, shape, ways=2):
    keys = jax.random.split(key, 2)
    y = jnp.tile(jnp.eye(ways), (2, 1))
    return Episode(*(Batch(jax.random.normal(k, (2 * ways, *shape)), y) for k in keys))


def tasks_of(*shape):
    return Tasks(lambda key, data: episode(key, shape), (), cross_entropy)


VECTORS, IMAGES = tasks_of(5), tasks_of(16, 16, 1)


def trained(learner, tasks=VECTORS, seed=0, **record):
    task = tasks.sample(jax.random.key(1), tasks.data)
    params, state = jax.jit(learner.init)(jax.random.key(seed), task)
    config = make_config(learner, tasks, **record)
    return Trained(learner, params, state, tasks.objective, record.get("preprocessing"), config)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def answers(found, tasks=VECTORS):
    support, query = tasks.sample(jax.random.key(2), tasks.data)
    key = jax.random.key(0)
    adapted = found.learner.adapt(found.params, found.state, support, key, train=False)
    return found.learner.predict(found.params, adapted, query.x, key, train=False)[0]


def test_a_folder_is_enough(tmp_path):
    learner = prototypical(mlp((4,)), distance="cosine")
    original = trained(
        learner, preprocessing={"image_size": 28}, run={"steps": 3, "widths": (1, 2)}
    )
    save_trained(tmp_path / "weights", original._replace(metadata={"seconds": 2.5}))
    found = load(tmp_path / "weights")
    assert_equal((found.params, found.state), (original.params, original.state))
    np.testing.assert_array_equal(answers(found), answers(original))
    assert found.objective is cross_entropy
    assert found.preprocessing == {"image_size": 28}
    assert found.learner.config == learner.config
    assert found.config == original.config
    assert found.config["run"] == {"steps": 3, "widths": [1, 2]}
    assert found.config["version"]
    assert found.metadata == load_parameters(tmp_path / "weights")[2] == {"seconds": 2.5}
    # And what was loaded is written again.
    save_trained(tmp_path / "again", found)
    assert_equal(load(tmp_path / "again").params, original.params)


@pytest.mark.usefixtures("optimized")  # as the other process, to the last bit
def test_components_of_ones_own_are_found_by_their_names(tmp_path):
    """In another process, which has never imported them."""
    network = registry.find("network", f"{OWN}:dense").factory(2, activation="relu")
    learner = registry.find("learner", f"{OWN}:linear").factory(
        network, objective=f"{OWN}:mean_absolute_error", factor=2.0
    )
    objective = registry.as_objective(f"{OWN}:mean_absolute_error")
    original = trained(learner, VECTORS._replace(objective=objective))
    save_trained(tmp_path, original)
    code = f"""
import sys
import numpy as np
from meta_jax.training.trained import load
assert "{OWN}" not in sys.modules
found = load(sys.argv[1])
x = np.arange(10.0, dtype=np.float32).reshape(2, 5)
adapted = found.learner.adapt(found.params, found.state, None, None, train=False)
outputs, _ = found.learner.predict(found.params, adapted, x, None, train=False)
print(found.objective.metric, outputs.tolist(), int(found.state[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    x = np.arange(10.0, dtype=np.float32).reshape(2, 5)
    adapted = learner.adapt(original.params, original.state, None, None, train=False)
    outputs, _ = learner.predict(original.params, adapted, x, None, train=False)
    assert done.stdout.strip() == f"mae {outputs.tolist()} 0"


def test_a_state_of_one_task_is_a_new_one(tmp_path):
    network = registry.find("network", f"{OWN}:dense").factory()
    factory = registry.find("learner", f"{OWN}:linear").factory
    learner = factory(network, objective="squared_error", scope="task")
    original = trained(learner)
    save_trained(tmp_path, original)
    assert "state" not in {
        name.split("/")[0] for name in checkpoints.read(tmp_path / "checkpoints" / "best").leaves
    }
    assert_equal(load(tmp_path).state, original.state)


def test_a_workdir_of_fit_best_and_latest(tmp_path):
    """With averaged parameters, and an optimizer of which loading knows nothing."""
    learner = prototypical(mlp((4,)))
    optimizer = optax.chain(optax.adam(1e-2), average_params(0.9))
    step = make_outer_step(learner, optimizer, VECTORS.sample, task_batch=2)
    result = fit(
        init_train_state(learner, optimizer, VECTORS, 0),
        make_train_loop(step),
        (),
        config=LoopConfig(4, 1, 2, 2),
        workdir=tmp_path,
        tasks_per_step=2,
        # Best after two steps.
        validate=lambda train_state: {"accuracy": -float(train_state.step)},
        objective=cross_entropy,
        learner_config=learner.config,
    )
    write_config(tmp_path, make_config(learner, VECTORS))
    latest = load(tmp_path, checkpoint="latest")
    assert_equal(latest.params, averaged_params(result.train_state))
    assert_equal(latest.state, result.train_state.state)
    best = load(tmp_path)
    assert (
        best.params["network"]["layer1"]["kernel"] != latest.params["network"]["layer1"]["kernel"]
    ).any()
    assert load_parameters(tmp_path)[2]["step"] == 2
    with pytest.raises(UsageError, match="unknown checkpoint 'newest': choose best or latest"):
        load(tmp_path, checkpoint="newest")


# ---- What may differ in a test, and what may not.


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conv4")
    learner = prototypical(conv4(2, normalisation="running"))
    original = trained(learner, IMAGES)
    save_trained(folder, original)
    return folder, original


def test_the_mode_of_normalisation_may_change(convolutional):
    folder, original = convolutional
    found = load(folder, network_settings={"normalisation": "batch"})
    assert_equal((found.params, found.state), (original.params, original.state))
    assert found.learner.config["network"]["normalisation"] == "batch"
    assert found.config["learner"]["network"]["normalisation"] == "batch"
    assert (answers(found, IMAGES) != answers(original, IMAGES)).any()


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"normalisation": "layer"}, "normalisation=running, which a test cannot change to layer"),
        ({"features": 3}, "conv4 was trained with features=2: a test may change its normalisation"),
        ({"name": "strided_conv4"}, "conv4 was trained with name=conv4: a test may change"),
        ({"widths": (4,)}, "conv4 was trained with widths=None"),
    ],
)
def test_nothing_else_of_a_network_may(convolutional, settings, culprit):
    with pytest.raises(UsageError, match=culprit) as caught:
        load(convolutional[0], network_settings=settings)
    assert "\n" not in str(caught.value)


def test_the_precision_is_that_of_the_training_and_may_change(tmp_path):
    original = trained(prototypical(with_precision(mlp((4,)), "bfloat16")))
    save_trained(tmp_path, original)
    assert load(tmp_path).learner.config == original.learner.config
    found = load(tmp_path, precision="float32")
    assert found.config["learner"] == prototypical(mlp((4,))).config
    assert_equal(found.params, original.params)
    exact, half = answers(found), answers(original)
    assert (exact != half).any()
    np.testing.assert_allclose(half, exact, atol=0.1)
    save_trained(tmp_path, trained(nearest_neighbour()))
    with pytest.raises(UsageError, match="has no network of a known name, whose precision"):
        load(tmp_path, precision="bfloat16")


def test_parameters_that_are_not_finite_are_not_loaded(tmp_path):
    original = trained(prototypical(mlp((4,))))
    params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), original.params)
    save_trained(tmp_path, original._replace(params=params))
    with pytest.raises(CheckpointError, match=r"parameters of .*best are not finite: take another"):
        load(tmp_path)


def test_settings_of_the_learner_may_change(tmp_path):
    original = trained(prototypical(mlp((4,))))
    save_trained(tmp_path, original)
    found = load(tmp_path, learner_settings={"distance": "cosine"})
    assert found.learner.config["distance"] == "cosine"
    assert (answers(found) != answers(original)).any()
    for name in ("objective", "network", "temperature"):
        with pytest.raises(UsageError, match=f"no setting '{name}' that a test may change: it has"):
            load(tmp_path, learner_settings={name: 1})


def test_what_changes_shapes_is_refused(convolutional, tmp_path):
    """A record was edited: the checkpoint knows better, and where it was edited too, shapes do."""
    folder, original = convolutional
    config = json.loads(json.dumps(original.config))
    config["learner"]["network"]["features"] = 3
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    write_config(tmp_path, config)
    with pytest.raises(
        CheckpointError, match=r"network.features = 2, and here network.features = 3"
    ):
        load(tmp_path)
    learned = {"params": original.params, "state": original.state}
    checkpoints.save(
        tmp_path / "other" / "checkpoints", "best", learned, {}, config=config["learner"]
    )
    write_config(tmp_path / "other", config)
    with pytest.raises(CheckpointError, match=r"holds \[2\] at params/.*, where \[3\] is expected"):
        load(tmp_path / "other")


def test_restore_does_not_put_weights_into_another_network(convolutional):
    folder, original = convolutional
    learned = {"params": original.params, "state": original.state}
    other = prototypical(conv4(2, normalisation="support"))
    with pytest.raises(CheckpointError, match=r'network.normalisation = "running", and here'):
        checkpoints.restore(folder / "checkpoints" / "best", learned, config=other.config)


def test_devices_are_no_part_of_what_a_learner_is():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("task",))
    assert prototypical(conv4(2, mesh=mesh)).config == prototypical(conv4(2)).config


# ---- What has no name.


def nameless_network():
    return Network(
        lambda key, x: ({"w": jax.random.normal(key, (x.shape[1], 3))}, {}),
        lambda params, state, x, **settings: (x @ params["w"], state),
    )


def test_a_network_without_a_name_is_given_again(tmp_path):
    learner = prototypical(nameless_network())
    original = trained(learner)
    save_trained(tmp_path, original)
    with pytest.raises(UsageError, match=r"the network of .* has no name: build it as it was"):
        load(tmp_path)
    found = load(tmp_path, learner=prototypical(nameless_network()))
    np.testing.assert_array_equal(answers(found), answers(original))
    with pytest.raises(CheckpointError, match='distance = "squared_euclidean", and here'):
        load(tmp_path, learner=prototypical(nameless_network(), distance="cosine"))
    with pytest.raises(UsageError, match="leave the settings out"):
        load(tmp_path, learner=learner, learner_settings={"distance": "cosine"})


def test_a_learner_without_a_name_is_given_again(tmp_path):
    learner = prototypical(mlp((4,)))._replace(config=None)
    original = trained(learner)
    save_trained(tmp_path, original)
    with pytest.raises(UsageError, match=r"the learner of .* has no name"):
        load(tmp_path)
    assert_equal(load(tmp_path, learner=learner).params, original.params)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_without_a_record(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"no config.json in|config.json is damaged") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_task_that_cannot_be_described_is_given_to_load(tmp_path):
    class Local(NamedTuple):
        support: Batch
        query: Batch

    assert describe_task({"what": object()}) is None
    local = VECTORS._replace(sample=lambda key, data: Local(*episode(key, (5,))))
    original = trained(prototypical(mlp((4,))), local)
    assert original.config["example"] is None
    save_trained(tmp_path, original)
    with pytest.raises(UsageError, match="no example of a task: give one as example="):
        load(tmp_path)
    example = local.sample(jax.random.key(0), ())
    assert_equal(load(tmp_path, example=example).params, original.params)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("run",), ..., "run is missing, where an object or null is expected"),
        (("run",), 7, "run is 7, where"),
        (("learner",), 7, "learner is 7, where"),
        (("learner", "name"), 7, "learner.name is 7, where a string is"),
        (("learner", "name"), ..., "learner.name is missing"),
        (("tasks",), None, "tasks is null, where an object is"),
        (("tasks", "objective"), None, "tasks.objective is null, where a string is"),
        (("example",), 3, "example is 3, where"),
        (("example",), ..., "example is missing"),
        (("example",), "foo", "'float32\\[3, 2\\]'"),
        (("example",), {"type": "meta_jax.core:Episode"}, "describes no task"),
        (("example",), {}, "describes no task"),
        (("learner",), None, "was built in Python"),
        (("optimizer",), 7, "optimizer is 7, where an object or null is"),
        (("optimizer",), ..., "optimizer is missing"),
        (("history",), 7, "history is 7, where an array is"),
    ],
)
def test_a_record_with_something_else_in_a_place_gets_one_line(tmp_path, place, value, message):
    save_trained(tmp_path, trained(prototypical(mlp((4,)))))
    config = read_config(tmp_path)
    *parents, name = place
    within = config
    for parent in parents:
        within = within[parent]
    within.pop(name, None)
    if value is not ...:
        within[name] = value
    write_config(tmp_path, config)
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def files_of(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_weights_that_come_with_the_package_are_those_of_the_ledger_and_small():
    package = Path(registry.__file__).parent / "pretrained"
    for name in ("prototypical", "maml"):
        of_ledger = Path(__file__).parents[2] / "results" / "weights" / f"{name}_omniglot"
        assert files_of(package / f"omniglot-{name}") == files_of(of_ledger)
    assert set(pretrained_names()) == {path.name for path in package.iterdir()}
    assert sum(map(len, files_of(package).values())) <= 2 * 2**20
    with pytest.raises(UsageError, match="choose one of glyphs-prototypical"):
        load_pretrained("omniglot")
