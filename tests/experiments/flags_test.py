"""Flags to components, runs and their records, inside one process."""

import doctest
import functools
import json
import sys
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from experiments import command_line, compare, records, run_flags, runs, seed_reports
from experiments.command_line import Chosen, read_setting
from meta_jax import registry
from meta_jax.core import Batch, Episode, MetaLearner, Network
from meta_jax.data.source import EpisodeSize, TaskSource, load_source, source_from_sampler
from meta_jax.host import OutOfMemoryError
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.objectives import as_objective

FLAGFILES = sorted(
    path
    for path in (command_line.Path(__file__).parents[2] / "experiments/flagfiles").glob("*.flags")
    if "experiments.train" in path.read_text()
)


def own_network(size: int = 3, *, spread: Literal["even", "odd"] = "even") -> Network:
    """Builds a network that repeats its inputs.

    Args:
      size: Number of copies.
      spread: Way of copying.
    """

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return jnp.repeat(x.reshape(x.shape[0], -1), size, 1), state

    return Network(lambda key, x: ({}, {}), apply)


def own_learner(network: Network, *, margin: float, objective="cross_entropy") -> MetaLearner:
    """Builds Prototypical Networks under another name.

    Args:
      network: The embedding.
      margin: Margin that must be given.
      objective: What is asked.
    """
    return prototypical(network, objective=objective)


def own_tasks(*, level: float = 0.5, objective: str = "cross_entropy") -> TaskSource:
    """Builds a source of one-dimensional signals.

    Args:
      level: Height of the signals.
      objective: What is asked.
    """

    def sample_of_size(size):
        def sample(key, data):
            return episode(size, (level * jnp.ones(16)).shape)

        return sample

    return source_from_sampler(sample_of_size, objective, splits=("train", "test"))


def episode(size, shape):
    y = jnp.eye(size.ways)
    return Episode(
        *(Batch(jnp.zeros((size.ways * n, *shape)), jnp.repeat(y, n, 0)) for n in size[1:])
    )


def source(*shape, objective="cross_entropy"):
    """A source whose episodes are all zero: nothing is loaded and nothing is drawn."""

    def sample_of_size(size):
        def sample(key, data):
            if as_objective(objective).kind == "classification":
                return episode(size, shape)
            batches = (Batch(jnp.zeros((n, *shape)), jnp.zeros((n, 1))) for n in size[1:])
            return Episode(*batches)

        return sample

    splits = ("train", "val", "trainval", "test")
    drawn = source_from_sampler(sample_of_size, objective, splits=splits)

    def tasks(split, size, *, train):
        found = drawn.tasks(split, size, train=train)
        return found._replace(batch=found.sample)

    return drawn._replace(tasks=tasks)


IMAGES = source(28, 28, 1)
CURVES = source(1, objective="squared_error")


def build(*arguments, source=IMAGES):
    return runs.build_run(run_flags.run_values(list(arguments)), source)


@functools.cache
def load_once(name):
    return load_source(name)


@pytest.mark.parametrize(
    ("arguments", "shots", "train_shots"),
    [
        (["--learner=reptile"], 1, 10),
        (["--learner=reptile", "--train_shots=3"], 1, 3),
        (["--learner=fomaml", "--shots=2"], 2, 2),
        (["--learner=fomaml", "--tasks=sinusoid"], 10, 10),
        (["--learner=fomaml", "--tasks=sinusoid", "--shots=5"], 5, 5),
    ],
)
def test_a_run_has_the_usual_settings_of_its_components(arguments, shots, train_shots):
    values = run_flags.run_values([*arguments, "--eval_every=0"])
    config = runs.build_run(values, load_once(run_flags.tasks_name(values))).config
    assert config["run"]["shots"] == shots
    assert config["run"]["train_shots"] == train_shots


@pytest.mark.parametrize("name", registry.names("learner"))
def test_a_learners_flag_alone_makes_a_run(name):
    usual = registry.find("learner", name).tasks
    for tasks, given in ((usual, []), ("sinusoid", ["--tasks=sinusoid"])):
        values = run_flags.run_values([f"--learner={name}", *given])
        try:
            run = runs.build_run(values, load_once(tasks))
        except UsageError as error:
            assert tasks == "sinusoid"
            kind = "classification" if usual == "glyphs" else "control"
            assert f"{name} is for {kind}" in str(error)
        else:
            assert run.config["learner"]["name"] == name
            assert run.config["tasks"]["name"] == tasks


class TestSettings:
    def test_a_setting_is_read_by_its_type(self):
        def setting(kind, choices=(), optional=False):
            return registry.Setting("x", kind, None, choices, optional, "")

        assert read_setting(setting(int), "7") == 7
        assert read_setting(setting(float), "1e-3") == 1e-3
        assert read_setting(setting(tuple), "40,40") == (40, 40)
        assert read_setting(setting(tuple), "64") == (64,)
        assert read_setting(setting(float, optional=True), "none") is None
        assert read_setting(setting(bool, optional=True), "false") is False
        assert read_setting(setting(str, ("none", "batch"), optional=True), "none") == "none"
        assert read_setting(setting(str, ("batch",), optional=True), "None") is None
        for bad, text in ((int, "1.5"), (float, "fast"), (tuple, "4,x"), (bool, "maybe")):
            with pytest.raises(ValueError, match=r"takes|boolean"):
                read_setting(setting(bad), text)
        with pytest.raises(ValueError, match="choose one of a, b"):
            read_setting(setting(str, ("a", "b")), "none")

    def test_only_what_is_given_reaches_the_factory(self):
        values = run_flags.run_values(["--learner=prototypical", "--network.features=8"])
        _, network, *_ = run_flags.choose(
            {name: values[name].value for name in run_flags.SELECTIONS}
        )
        given = command_line.given_settings(values, network)
        assert given == {"features": 8, "normalisation": "running"}  # the learner's usual one
        resolved = command_line.resolved_settings(network, given)
        assert resolved["features"] == 8
        assert "mesh" not in resolved

    def test_booleans_may_stand_alone(self):
        for flag, value in (
            ("--learner.joint_encoding", True),
            ("--nolearner.joint_encoding", False),
            ("--learner.joint_encoding=false", False),
        ):
            values = run_flags.run_values([flag])
            assert values["learner.joint_encoding"].value is value

    def test_a_setting_without_a_default_is_asked_for(self):
        name = f"{__name__}:own_learner"
        with pytest.raises(UsageError, match=r"needs --learner\.margin: Margin that must be given"):
            build(f"--learner={name}")
        config = build(f"--learner={name}", "--learner.margin=2").config
        assert config["learner"]["margin"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--learner=x"], "unknown learner 'x': choose one of .*prototypical"),
        (["--network=x"], "unknown network 'x'"),
        (["--tasks=x"], "unknown tasks 'x'"),
        (["--optimizer=x"], "unknown optimizer 'x'"),
        (["--learner=no.such.module:f"], "no.such.module.*cannot be imported"),
        (["--tasks=folder"], "folder:PATH"),
        (["--learner.inner_lr=1"], "prototypical has no setting 'inner_lr': it has distance"),
        (["--learner=maml", "--learner.num_slots=1"], "maml has no setting 'num_slots'.*inner_lr"),
        (["--network=mlp", "--network.features=1"], "mlp has no setting 'features'.*widths"),
        (["--tasks=glyphs", "--tasks.split_rule=lake"], "glyphs has no setting 'split_rule'"),
        (["--learner.distance=x"], "learner.distance=x: choose one of squared_euclidean, cosine"),
        (["--network.normalisation=x"], "choose one of none, batch, running"),
        (["--network.features=many"], "network.features=many: it takes a whole number"),
        (["--steps=0"], "steps"),
        (["--weight_decay=0.1"], "did you mean --optimizer.weight_decay?"),
        (["--lerning_rate=0.1"], "did you mean --optimizer.learning_rate?"),
        (["--learner=maml", "--inner_lr=0.1"], "did you mean --learner.inner_lr?"),
        (["--task_bach=4"], "did you mean --task_batch?"),
        (["--zzz=4"], "unknown flag --zzz: --help lists all flags"),
        (["--learner=meta_networks", "--network=conv4"], "networks of its own: leave --network"),
        (["--flagfile=no/such/file"], "no/such/file"),
    ],
)
def test_a_mistake_in_the_flags_is_named(arguments, culprit):
    with pytest.raises(UsageError, match=culprit):
        run_flags.run_values(arguments)


@pytest.mark.parametrize(
    ("arguments", "source", "culprit"),
    [
        (["--learner=maml", "--train_ways=20"], IMAGES, "--ways=5 must equal --train_ways=20"),
        (["--learner=mann", "--train_ways=20"], IMAGES, "--ways=5 must equal --train_ways=20"),
        (["--learner=reptile", "--train_ways=20"], IMAGES, "must equal --train_ways"),
        (["--learner=siamese"], CURVES, "siamese is for classification"),
        (["--learner=mann"], CURVES, "mann is for classification"),
        (["--learner=protomaml"], CURVES, "protomaml is for classification"),
        (["--learner=relation", "--network=mlp"], IMAGES, "maps"),
        (["--learner=matching", "--learner.temperature=0"], IMAGES, "temperature"),
        (["--learner=maml", "--learner.adjoint=x"], IMAGES, "unknown adjoint 'x'"),
        (["--learner=imaml", "--learner.proximity=0"], IMAGES, "proximity"),
        (["--learner=mann", "--learner.num_slots=3"], IMAGES, "slots"),
        (["--train_split=test"], IMAGES, "--train_split=test"),
        (
            ["--train_split=val2"],
            IMAGES,
            "no split 'val2': choose one of train, val, trainval, test",
        ),
        (["--log_every=3"], IMAGES, "multiple of log_every"),
        (["--optimizer.halve_every=5"], IMAGES, "needs schedule=step"),
        (["--network.widths=4"], IMAGES, "conv4 has no setting 'widths'"),
        (["--network.features=4"], CURVES, "mlp has no setting 'features'"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, source, culprit):
    with pytest.raises(UsageError, match=culprit):
        build(*arguments, source=source)


def test_an_in_context_learner_is_tested_on_fewer_classes_than_it_trains_on_not_on_more():
    small = ("--learner=in_context", "--learner.width=8", "--learner.layers=1")
    run = build(*small, "--train_ways=10", "--ways=5").config["run"]
    assert (run["train_ways"], run["ways"]) == (10, 5)
    with pytest.raises(UsageError, match="--ways=20 must equal --train_ways=10"):
        build(*small, "--train_ways=10", "--ways=20")


class TestRecord:
    @pytest.mark.parametrize("name", registry.names("learner"))
    def test_a_learner_by_its_name_alone_has_its_own_defaults(self, name):
        component = registry.find("learner", name)
        usual = IMAGES if component.tasks == "glyphs" else load_once(component.tasks)
        config = build(f"--learner={name}", source=usual).config
        given = run_flags.GIVEN_TO_LEARNERS
        for setting in registry.settings(component, reserved=given).values():
            if setting.default is not None:  # None is resolved by the registry
                assert config["learner"][setting.name] == setting.default, setting.name
        if component.network is None:
            assert "network" not in config["learner"]
        else:
            network = config["learner"]["network"]
            assert network["name"] == component.network
            assert network.get("normalisation") in (component.normalisation, None)
        assert config["optimizer"]["name"] == component.optimizer

    def test_it_holds_every_setting_resolved_and_nothing_of_others(self):
        config = build("--learner=maml", "--train_queries=5", "--tasks.image_size=28").config
        assert json.loads(json.dumps(config)) == config
        assert list(config) == ["version", "learner", "tasks", "optimizer", "run", "example"]
        assert config["learner"]["inner_lr"] > 0
        assert config["tasks"]["objective"] == "cross_entropy"
        assert config["tasks"]["name"] == "glyphs"
        assert config["optimizer"]["learning_rate"] == 1e-3
        run = config["run"]
        assert (run["ways"], run["train_ways"], run["queries"], run["train_queries"]) == (
            5,
            5,
            15,
            5,
        )
        assert "data_dir" not in config["tasks"]

    def test_learner_and_network_are_built_again_from_it(self):
        config = build("--learner=maml", "--network.features=8", "--learner.steps=2").config
        again = registry.build("learner", config["learner"])
        assert json.loads(json.dumps(again.config)) == config["learner"]

    def test_the_tasks_objective_is_the_learners(self):
        config = build("--learner=maml", source=CURVES).config
        assert config["learner"]["objective"] == "squared_error"

    def test_a_learner_is_given_a_network_that_takes_the_inputs(self):
        def network(*arguments, source):
            return build(*arguments, source=source).config["learner"]["network"]["name"]

        assert network(source=IMAGES) == "conv4"
        assert network("--learner=maml", source=CURVES) == "mlp"
        assert network("--learner=prototypical", source=source(64)) == "mlp"
        assert network("--network=flatten", source=IMAGES) == "flatten"

    @pytest.mark.parametrize("path", FLAGFILES, ids=lambda path: path.stem)
    def test_every_flagfile_builds_its_run(self, path):
        values = run_flags.run_values([f"--flagfile={path}"])
        side = values["tasks.image_size"].value if "tasks.image_size" in values else None
        of_images = values.tasks in ("omniglot", "glyphs")
        fake = source(*[side or 28] * 2, 1) if of_images else runs.load_tasks(values)
        config = runs.build_run(values, fake).config
        for name in values:
            if values[name].present and name != "flagfile":
                recorded = records.as_flags(config)[name]
                assert recorded == values[name].value, name


def test_a_data_folder_that_nothing_reads_is_refused():
    values = run_flags.run_values(["--learner=prototypical", "--tasks=glyphs", "--data_dir=data"])
    with pytest.raises(UsageError, match="--data_dir=data is of no use: glyphs reads no such"):
        runs.load_tasks(values)


def test_a_classifier_of_all_classes_gets_their_number_from_the_tasks():
    values = run_flags.run_values(["--learner=simple_shot", "--shots=1", "--train_shots=2"])
    run = runs.build_run(values, load_once("glyphs"))
    classes = run.training.data.counts.size
    assert classes > 100
    assert run.config["learner"]["train_classes"] == classes
    batch = runs.example_task(run.training)
    assert batch.support.y.shape == (5 * 2, classes)
    assert runs.example_task(run.testing).support.y.shape == (5, 5)
    assert runs.example_task(run.validation).support.y.shape == (5, 5)
    with pytest.raises(UsageError, match="no setting 'train_classes'"):
        run_flags.run_values(["--learner=simple_shot", "--learner.train_classes=7"])
    with pytest.raises(UsageError, match=r"no ordinary batches.*choose a source of labelled"):
        build("--learner=baseline", "--network=mlp", "--eval_every=0", source=own_tasks())


def test_somebodys_own_components_need_nothing_of_ours():
    config = runs.build_run(
        run_flags.run_values(
            [
                f"--tasks={__name__}:own_tasks",
                "--tasks.level=0.25",
                f"--network={__name__}:own_network",
                "--network.spread=odd",
                "--eval_every=0",
            ]
        ),
        own_tasks(level=0.25),
    ).config
    assert config["tasks"]["level"] == 0.25
    assert config["learner"]["network"] == {
        "name": f"{__name__}:own_network",
        "size": 3,
        "spread": "odd",
    }


def test_a_split_that_is_not_used_is_not_asked_for():
    own = own_tasks()
    assert build("--network=mlp", "--eval_every=0", source=own).validation is None
    with pytest.raises(UsageError, match="no split 'val'"):
        build("--network=mlp", source=own)


def test_training_and_test_episodes_differ_where_the_flags_say_so():
    run = build("--ways=5", "--shots=1", "--train_ways=20", "--train_queries=3").config["run"]
    assert runs.training_size(run) == EpisodeSize(20, 1, 3)
    assert runs.test_size(run) == EpisodeSize(5, 1, 15)


def test_devices_share_the_images_of_a_lone_task_where_the_network_can(monkeypatch):
    meshes = {1: None, 2: "mesh"}
    monkeypatch.setattr(runs, "task_mesh", meshes.get)
    monkeypatch.setattr(runs.jax, "device_count", lambda: 2)

    def mesh(network, task_batch):
        return runs.image_mesh(Chosen("network", registry.find("network", network)), task_batch)

    assert mesh("conv4", 1) == "mesh"
    assert mesh("conv4", 2) is None
    assert mesh("mlp", 1) is None
    assert runs.image_mesh(None, 1) is None


def test_the_outer_optimizer_has_the_runs_steps():
    values = run_flags.run_values(
        [
            *("--optimizer=sgd", "--optimizer.learning_rate=0.5", "--optimizer.schedule=linear"),
            "--steps=4",
        ]
    )
    optimizer, record = runs.build_optimizer(values)
    one = jnp.ones(())
    state, taken = optimizer.init(one), []
    for _ in range(5):
        update, state = optimizer.update(one, state)
        taken.append(-float(update))
    assert taken == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert (record["name"], record["schedule"], record["clip_norm"]) == ("sgd", "linear", None)


class TestHelp:
    def text(self, *arguments):
        values = flags.FlagValues()
        run_flags.define_run_flags(values)
        _, chosen = command_line.parse(
            values, ["", *arguments], selections=run_flags.SELECTIONS, choose=run_flags.choose
        )
        return command_line.help_text(values, chosen, "Trains.", "python -m experiments.train")

    def test_it_has_every_run_flag_with_a_sentence(self):
        values = flags.FlagValues()
        run_flags.define_run_flags(values)
        text = self.text()
        for name in values:
            assert f"  --{name}=" in text
            assert values[name].help.endswith("."), name

    def test_it_has_the_chosen_learners_settings_and_no_other_learners(self):
        text = self.text("--learner=maml")
        component = registry.find("learner", "maml")
        settings = registry.settings(component, reserved=("objective",))
        shown = [line for line in text.splitlines() if line.startswith("  --learner.")]
        assert len(shown) == len(settings)
        words = " ".join(text.split())
        for name, setting in settings.items():
            assert f"--learner.{name}=" in text
            assert setting.doc in words
            assert setting.doc
        assert registry.summary(component) in words
        assert "num_slots" not in text
        assert "objective" not in text.split("--tasks=")[0]

    def test_it_has_defaults_and_choices_of_networks_tasks_and_optimizers(self):
        text = self.text("--learner=maml", "--tasks=omniglot")
        words = " ".join(text.split())
        assert "--network.features=INT Channels" in words
        assert "[default: 64]" in text
        assert "[default: batch]" in text  # MAML's usual normalisation
        assert "--tasks.split_rule=vinyals|lake" in text
        assert "--optimizer.schedule=constant|linear|cosine|step" in text
        for kind in ("learner", "network", "tasks", "optimizer"):
            for name in registry.names(kind):
                assert name in words
        assert "folder:PATH" in text

    def test_a_network_that_is_named_is_the_only_one(self):
        text = self.text("--network=koch")
        assert "--network=koch: " in text
        assert "--network.widths" not in text


@pytest.mark.parametrize("module", [command_line, compare, records, seed_reports])
def test_the_examples_in_the_docstrings_are_true(module):
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
    assert found.attempted > 0


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes"),
        MemoryError("Unable to allocate 9 TiB"),
        OutOfMemoryError("a step needs more memory than there is: lower it"),
    ],
)
def test_exhausted_memory_ends_a_binary_in_one_line(error, capsys):
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as ended:
        command_line.guarded(main, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    other = jax.errors.JaxRuntimeError("INTERNAL: a fault of XLA")
    with pytest.raises(jax.errors.JaxRuntimeError):
        command_line.guarded(mock.Mock(side_effect=other), [])


def test_a_binary_whose_output_nobody_reads_ends_without_a_word(monkeypatch, capsys):
    monkeypatch.setattr(command_line.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        command_line.guarded(mock.Mock(side_effect=BrokenPipeError), [])
    assert ended.value.code == 141
    assert capsys.readouterr() == ("", "")
