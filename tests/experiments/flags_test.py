"""Flags to learners and tasks, inside one process."""

import jax.numpy as jnp
import pytest
from absl import flags

from experiments import command_line, learners, tasks
from experiments.command_line import UsageError


@pytest.fixture
def values(tmp_path_factory):
    def parse(text=""):
        path = tmp_path_factory.mktemp("flags") / "flags.txt"
        path.write_text(text)
        return command_line.run_flag_values(path)

    return parse


def test_flags_survive_their_file(values):
    given = values("--ways=7\n--learning_rate=0.125\n--learner=maml\n--batch_norm=support\n")
    again = values(command_line.run_flag_lines(given))
    assert again.flag_values_dict() == given.flag_values_dict()
    assert (again.ways, again.learning_rate, again.train_ways) == (7, 0.125, None)


def test_every_run_flag_has_a_description():
    found = flags.FlagValues()
    command_line.define_run_flags(found)
    assert all(found[name].help for name in found)


def test_a_flags_file_of_another_version_is_named(values):
    with pytest.raises(UsageError, match="does not fit this version"):
        values("--no_such_flag=1\n")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("--learner=x\n", "unknown learner 'x'"),
        ("--network=x\n", "unknown network 'x'"),
        ("--batch_norm=x\n", "unknown batch norm 'x'"),
        ("--distance=x\n", "unknown distance 'x'"),
        ("--learner=maml\n--adjoint=x\n", "unknown adjoint 'x'"),
        ("--learner=maml\n--train_ways=20\n", "must equal --train_ways"),
        ("--learner=mann\n--dataset=sinusoid\n", "mann classifies"),
        ("--learner=mann\n--train_ways=20\n", "must equal --train_ways"),
        ("--learner=mann\n--memory_slots=3\n", "4 heads do not fit 3 memory slots"),
        ("--learner=meta_networks\n--network=conv4\n", "leave --network out"),
        ("--protocol=x\n", "unknown protocol 'x'"),
        ("--protocol=sequence\n", "mann, lstm.*not prototypical"),
        ("--learner=kernel\n--kernel=x\n", "unknown kernel 'x'"),
        ("--learner=matching\n--temperature=0\n", "temperature 0.0 is impossible"),
        ("--learner=siamese\n--dataset=sinusoid\n", "siamese classifies"),
        ("--learner=relation\n--dataset=sinusoid\n", "relation classifies"),
        ("--learner=relation\n--network=conv4\n", "feature maps"),
        ("--learner=reptile\n--train_ways=20\n", "must equal --train_ways"),
        ("--learner=maml\n--adjoint=implicit\n", "imaml has one"),
        ("--learner=maml\n--adjoint=mixed_mode\n", "--adjoint=checkpointed"),
        ("--learner=anil\n--inner_reduction=x\n", "unknown reduction 'x'"),
        ("--learner=imaml\n--proximity=0\n", "proximity above zero"),
        ("--learner=reptile\n--adjoint=unrolled\n", "leave --adjoint out"),
        ("--learner=protomaml\n--dataset=sinusoid\n", "protomaml classifies"),
    ],
)
def test_a_learner_that_cannot_be_built_is_named(text, culprit, values):
    with pytest.raises(UsageError, match=culprit):
        learners.build_learner(values(text))


@pytest.mark.parametrize("name", learners.LEARNERS)
def test_every_learner_is_built_by_its_name_alone(name, values):
    learner, _ = learners.build_learner(values(f"--learner={name}\n"))
    assert callable(learner.adapt)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("--optimizer=x\n", "unknown optimizer 'x'"),
        ("--decay=x\n", "unknown decay 'x'"),
        ("--decay=linear\n--halve_every=5\n", "exclude each other"),
    ],
)
def test_an_outer_optimizer_that_cannot_be_built_is_named(text, culprit, values):
    with pytest.raises(UsageError, match=culprit):
        learners.build_optimizer(values(text))


def test_reptile_s_plain_step_decays_to_zero(values):
    optimizer = learners.build_optimizer(
        values("--learner=reptile\n--learning_rate=0.5\n--decay=linear\n--steps=4\n")
    )
    one = jnp.ones(())
    state, taken = optimizer.init(one), []
    for _ in range(5):
        update, state = optimizer.update(one, state)
        taken.append(-float(update))
    assert taken == [0.5, 0.375, 0.25, 0.125, 0.0]


def test_the_outer_gradient_is_clipped_to_its_norm(values):
    optimizer = learners.build_optimizer(
        values("--optimizer=sgd\n--learning_rate=1\n--clip_norm=0.5\n")
    )
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    update, _ = optimizer.update(gradient, optimizer.init(gradient))
    assert abs(float(update["a"][0]) + 0.3) < 1e-6


@pytest.mark.parametrize(
    "adjoint", ["unrolled", "checkpointed", "mixed_mode", "truncated", "first_order", "implicit"]
)
def test_every_adjoint_has_its_name(adjoint, values):
    learner, _ = learners.build_learner(
        values(f"--learner=imaml\n--network=mlp\n--adjoint={adjoint}\n")
    )
    assert callable(learner.adapt)


def test_training_and_test_episodes_differ_where_the_flags_say_so(values):
    given = values("--ways=5\n--shots=1\n--train_ways=20\n--train_queries=3\n--queries=15\n")
    assert tasks.training_spec(given)[:3] == (20, 1, 3)
    assert tasks.test_spec(given)[:3] == (5, 1, 15)


class TestClaimWorkdir:
    def test_a_new_one_is_made(self, tmp_path, values):
        command_line.claim_workdir(tmp_path / "a" / "b", values())
        assert (tmp_path / "a" / "b" / "flags.txt").read_text() == command_line.run_flag_lines(
            values()
        )

    def test_the_same_flags_may_come_back(self, tmp_path, values):
        command_line.claim_workdir(tmp_path, values())
        command_line.claim_workdir(tmp_path, values())

    def test_a_flag_that_is_newer_than_the_workdir_had_its_default(self, tmp_path, values):
        command_line.claim_workdir(tmp_path, values())
        path = tmp_path / "flags.txt"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if not line.startswith("--seed")))
        command_line.claim_workdir(tmp_path, values())
        with pytest.raises(UsageError, match=r"other flags \(seed\)"):
            command_line.claim_workdir(tmp_path, values("--seed=1\n"))

    def test_other_flags_are_refused_by_name(self, tmp_path, values):
        command_line.claim_workdir(tmp_path, values())
        with pytest.raises(UsageError, match=r"other flags \(seed, train_ways\)"):
            command_line.claim_workdir(tmp_path, values("--seed=1\n--train_ways=9\n"))

    def test_a_folder_of_something_else_is_refused(self, tmp_path, values):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(UsageError, match="not empty"):
            command_line.claim_workdir(tmp_path, values())
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_devices_share_the_images_of_a_lone_task_where_the_network_can(values, monkeypatch):
    meshes = {1: None, 2: "mesh"}
    monkeypatch.setattr(learners, "task_mesh", meshes.get)
    monkeypatch.setattr(learners.jax, "device_count", lambda: 2)
    assert learners.image_mesh(values("--learner=prototypical\n")) == "mesh"
    assert learners.image_mesh(values("--learner=prototypical\n--task_batch=2\n")) is None
    assert learners.image_mesh(values("--learner=relation\n")) is None
