"""The record of a run: what may change in an old workdir, and which workdir is taken by default."""

import json

import jax.numpy as jnp
import pytest

from experiments import records
from meta_jax.lookup import UsageError
from meta_jax.training import checkpoints
from meta_jax.training.record import read_config, write_config

PARAMS = {"w": jnp.zeros((2, 3))}


@pytest.fixture
def config():
    return {
        "version": "0.1.0",
        "learner": {"name": "maml", "inner_lr": 2.0, "network": {"name": "mlp", "widths": [4]}},
        "tasks": {"name": "glyphs", "image_size": 28, "objective": "cross_entropy"},
        "example": None,
        "optimizer": {"name": "adam", "learning_rate": 1e-3},
        "run": {"ways": 5, "seed": 0, "steps": 10},
    }


def changed(config, **parts):
    return {**config, **{part: {**config[part], **new} for part, new in parts.items()}}


class TestClaimWorkdir:
    def test_a_new_one_is_made(self, tmp_path, config):
        records.claim_workdir(tmp_path / "a" / "b", config)
        assert read_config(tmp_path / "a" / "b") == config

    def test_the_same_settings_may_come_back(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        records.claim_workdir(tmp_path, {**config, "version": "0.2.0"})
        assert read_config(tmp_path) == config

    def test_other_settings_are_refused_by_name(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        other = changed(config, learner={"inner_lr": 1.0}, run={"seed": 1})
        with pytest.raises(UsageError, match=r"other settings \(learner\.inner_lr, seed\)"):
            records.claim_workdir(tmp_path, other)
        network = changed(config, learner={"network": {"name": "mlp", "widths": [8]}})
        with pytest.raises(UsageError, match=r"other settings \(network\.widths\)"):
            records.claim_workdir(tmp_path, network)
        half = {"name": "mlp", "widths": [4], "with_precision": "bfloat16"}
        with pytest.raises(UsageError, match=r"other settings \(precision\)"):
            records.claim_workdir(tmp_path, changed(config, learner={"network": half}))
        assert read_config(tmp_path) == config

    def test_dials_of_memory_may_change(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        dials = {"tasks.placement": "host", "tasks.device_memory": 8.0, "task_chunk": 1}
        where = {"placement": "host", "device_memory": 8.0}
        turned = changed(config, tasks=where, run={"task_chunk": 1})
        records.claim_workdir(tmp_path, turned)
        (entry,) = read_config(tmp_path)["history"]
        assert entry["changed"] == {name: [None, value] for name, value in dials.items()}

    def test_its_steps_may_grow(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        checkpoints.save_step(tmp_path / "checkpoints", 7, PARAMS, {"step": 7})
        more = changed(config, run={"steps": 20})
        for _ in range(2):  # the second time nothing has changed
            records.claim_workdir(tmp_path, more)
            history = [{"step": 7, "changed": {"steps": [10, 20]}}]
            assert read_config(tmp_path) == {**more, "history": history}
        with pytest.raises(UsageError, match=r"other settings \(steps\)"):
            records.claim_workdir(tmp_path, config)

    def test_numbers_of_the_optimizer_may_change_and_are_written_down_once(self, tmp_path, config):
        config = changed(config, optimizer={"clip_norm": 1.0})
        records.claim_workdir(tmp_path, config, params=PARAMS)
        slower = changed(config, optimizer={"learning_rate": 1e-4, "clip_norm": 2.0})
        for _ in range(2):
            records.claim_workdir(tmp_path, slower, params=PARAMS)
        first = {"optimizer.clip_norm": [1.0, 2.0], "optimizer.learning_rate": [1e-3, 1e-4]}
        assert read_config(tmp_path)["history"] == [{"step": 0, "changed": first}]
        checkpoints.save_step(tmp_path / "checkpoints", 4, PARAMS, {"step": 4})
        slowest = changed(slower, optimizer={"learning_rate": 1e-5}, run={"steps": 12})
        records.claim_workdir(tmp_path, slowest, params=PARAMS)
        found = read_config(tmp_path)
        second = {"optimizer.learning_rate": [1e-4, 1e-5], "steps": [10, 12]}
        assert found.pop("history") == [
            {"step": 0, "changed": first},
            {"step": 4, "changed": second},
        ]
        assert found == slowest

    @pytest.mark.parametrize(
        "setting",
        [{"clip_norm": 1.0}, {"schedule": "cosine"}, {"ema": 0.9}, {"name": "adamw"}],
        ids=str,
    )
    def test_what_changes_the_optimizers_state_is_refused(self, tmp_path, config, setting):
        records.claim_workdir(tmp_path, config, params=PARAMS)
        other = changed(config, optimizer=setting)
        with pytest.raises(UsageError, match=r"\(optimizer.*name another workdir"):
            records.claim_workdir(tmp_path, other, params=PARAMS)
        assert read_config(tmp_path) == config

    def test_without_parameters_to_compare_the_optimizer_is_as_it_was(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        with pytest.raises(UsageError, match=r"\(optimizer\.learning_rate\): name another"):
            records.claim_workdir(tmp_path, changed(config, optimizer={"learning_rate": 1.0}))

    def test_a_setting_that_is_newer_than_the_workdir_had_its_default(self, tmp_path, config):
        records.claim_workdir(tmp_path, config)
        newer = changed(config, learner={"reduction": "mean"})
        records.claim_workdir(tmp_path, newer, given={"learner", "seed"})
        assert read_config(tmp_path) == config
        with pytest.raises(UsageError, match=r"other settings \(learner\.reduction\)"):
            records.claim_workdir(tmp_path, newer, given={"learner.reduction"})

    def test_a_folder_of_something_else_is_refused(self, tmp_path, config):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(UsageError, match="not empty"):
            records.claim_workdir(tmp_path, config)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_damaged_record_is_named(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UsageError, match=r"config\.json is damaged"):
            records.claim_workdir(tmp_path, {})


class TestDefaultWorkdir:
    def test_the_first_that_is_free_or_holds_the_same_run(self, tmp_path, config):
        first = tmp_path / "maml_glyphs"
        assert records.default_workdir(config, parent=tmp_path) == (first, "new")
        write_config(first, changed(config, run={"seed": 7}))
        second, why = records.default_workdir(config, parent=tmp_path)
        assert second == tmp_path / "maml_glyphs-2"
        assert f"{first} holds something else" in why
        write_config(second, config)
        longer = changed(config, run={"steps": 99})
        found, why = records.default_workdir(longer, parent=tmp_path)
        assert (found, why.split(",")[0]) == (second, "goes on")
        # With another learning rate it is another run, unless its workdir is named.
        slower = changed(config, optimizer={"learning_rate": 1e-4})
        assert records.default_workdir(slower, parent=tmp_path)[0] == tmp_path / "maml_glyphs-3"

    def test_what_is_not_ours_is_left_alone(self, tmp_path, config):
        for name, content in (("maml_glyphs", "thesis.tex"), ("maml_glyphs-2", "config.json")):
            (tmp_path / name).mkdir()
            (tmp_path / name / content).write_text("{")
        assert records.default_workdir(config, parent=tmp_path)[0] == tmp_path / "maml_glyphs-3"
        (tmp_path / "maml_glyphs" / "thesis.tex").unlink()
        assert records.default_workdir(config, parent=tmp_path)[0] == tmp_path / "maml_glyphs"


class TestSeeds:
    def test_a_record_of_several_seeds(self, config):
        assert list(records.seeds_of(config)) == [0]
        several = records.with_seeds(records.with_seed(config, 3), 2)
        assert list(records.seeds_of(several)) == [3, 4]
        assert config["run"] == {"ways": 5, "seed": 0, "steps": 10}

    def test_seeds_may_grow_and_one_run_is_not_several(self, tmp_path, config):
        records.claim_workdir(tmp_path, records.with_seeds(config, 2))
        records.claim_workdir(tmp_path, records.with_seeds(config, 3))
        assert read_config(tmp_path)["history"] == [{"step": 0, "changed": {"seeds": [2, 3]}}]
        for other in (records.with_seeds(config, 2), config):
            with pytest.raises(UsageError, match=r"other settings \(seeds\)"):
                records.claim_workdir(tmp_path, other)

    def test_a_result_counts_where_nothing_is_left_to_do(self, tmp_path, config):
        write_config(tmp_path, config)
        assert records.finished_result(tmp_path, config, episodes=100) is None
        record = {"steps": 10, "episodes": 100}
        (tmp_path / "result.json").write_text(json.dumps(record))
        assert records.finished_result(tmp_path, config, episodes=100) == record
        assert records.finished_result(tmp_path, config, episodes=200) is None
        (tmp_path / "result.json").write_text("[")
        assert records.finished_result(tmp_path, config, episodes=100) is None
        (tmp_path / "result.json").write_text(json.dumps(record))
        for other in (changed(config, run={"steps": 20}), changed(config, run={"seed": 1})):
            assert records.finished_result(tmp_path, other, episodes=100) is None
