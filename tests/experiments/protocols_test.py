"""Known tests on Omniglot: their episodes, and their flags."""

import json

import jax
import numpy as np
import pytest

from experiments import folder_tests, ledger, protocols
from experiments.rows import ROWS
from experiments.testing import Asked
from meta_jax.data.source import EpisodeSize, load_source
from meta_jax.lookup import UsageError
from tests.binaries import command
from tests.omniglot_runs import contents, write_zip

WEIGHTS = ledger.ROOT / "results/weights/prototypical_omniglot"


def test_episodes_of_lake_are_one_drawer_against_another_in_one_alphabet(omniglot_zips):
    lake = protocols.PROTOCOLS["lake"]
    assert lake.run["eval_episodes"] == 10_000
    source = load_source("omniglot", data_dir=str(omniglot_zips), image_size=14, **lake.settings)
    size = EpisodeSize(*(lake.run[name] for name in EpisodeSize._fields))
    tasks = source.tasks("test", size, train=False)
    data = tasks.data
    assert len(data.counts) == 659
    images = np.asarray(data.examples).reshape(659 * 20, -1)
    rows = {image.tobytes(): row for row, image in enumerate(images)}
    sample, groups = jax.jit(tasks.sample), set()
    for seed in range(20):
        support, query = sample(jax.random.key(seed), data)
        found = []
        for x, y, _ in (support, query):
            assert x.shape == (20, 14, 14, 1)
            np.testing.assert_array_equal(np.asarray(y).sum(0), np.ones(20))
            drawn = np.rint(np.asarray(x) * 255).astype(np.uint8).reshape(20, -1)
            characters, drawers = np.divmod([rows[image.tobytes()] for image in drawn], 20)
            assert len(set(characters)) == 20
            assert len(set(drawers)) == 1
            alphabet = set(np.asarray(data.groups)[characters])
            assert len(alphabet) == 1
            by_label = characters[np.argsort(np.asarray(y).argmax(1))]
            found.append((by_label.tolist(), drawers[0], alphabet.pop()))
        (of_support, drawer, group), (of_query, other, same) = found
        assert of_support == of_query
        assert drawer != other
        assert group == same
        groups.add(group)
    assert len(groups) > 5


def test_a_protocol_leaves_no_choice_of_its_own_settings():
    tasks, settings = protocols.tasks_of(
        "lake", None, {"network": {"normalisation": "batch"}, "tasks": {"image_size": 35}}
    )
    assert (tasks, settings["network"]) == ("omniglot", {"normalisation": "batch"})
    assert settings["tasks"] == {"image_size": 35, **protocols.PROTOCOLS["lake"].settings}
    for name, given, culprit in (
        ("lake", (None, {"tasks": {"split_rule": "vinyals"}}), "leave split_rule=vinyals out"),
        ("lake", ("glyphs", {}), "leave tasks 'glyphs' out"),
        ("lakes", (None, {}), "choose one of lake, all_characters"),
    ):
        with pytest.raises(UsageError, match=culprit):
            protocols.tasks_of(name, *given)


def test_rows_have_the_episodes_of_their_protocol():
    row = ROWS["prototypical/omniglot_lake"]
    assert row.size() == {"ways": 20, "shots": 1, "queries": 1}
    assert row.number == 10_000
    assert ROWS["prototypical/omniglot_5w1s"].size() == {"ways": 5, "shots": 1}
    assert ROWS["prototypical/omniglot_5w1s"].number == 1000
    for name, row in ROWS.items():
        assert row.official == name.endswith("_official"), name


@pytest.mark.parametrize(("shift", "accuracy"), [(0, 100.0), (1, 0.0)])
def test_official_trials_count_the_answers(tmp_path, shift, accuracy):
    # A test image is the training image of its class, or with wrong labels that of another.
    path = write_zip(tmp_path / "all_runs.zip", contents(shift=shift))
    found = folder_tests.evaluate_trials(WEIGHTS, str(path))
    assert (found.tested.score.mean, found.tested.score.ci95) == (accuracy, 0.0)
    assert found.record["protocol"] == "lake, official trials"
    assert [found.record[key] for key in ("ways", "shots", "queries", "episodes")] == [20, 1, 1, 20]
    (note,) = found.notes
    assert "236 of the characters" in note


def test_trials_on_which_a_learner_cannot_be_tested_are_refused(tmp_path):
    path = str(write_zip(tmp_path / "all_runs.zip", contents()))
    weights = ledger.ROOT / "results/weights/fomaml_omniglot"
    with pytest.raises(UsageError, match="fomaml was trained with parameters that do not fit"):
        folder_tests.evaluate_trials(weights, path)


def test_the_flags_of_a_protocol(omniglot_zips, tmp_path):
    path = write_zip(tmp_path / "all_runs.zip", contents())
    weights = (f"--weights={WEIGHTS}", f"--data_dir={omniglot_zips}")
    found = command(
        *("evaluate", *weights, "--protocol=lake", "--eval_episodes=4", f"--runs={path}"),
        f"--output={tmp_path / 'out.json'}",
    )
    assert found.returncode == 0, found.stderr
    random, official, note = found.stdout.splitlines()
    assert "(20-way 1-shot, 4 episodes, normalisation running, protocol lake)" in random
    assert official.startswith("test accuracy 100.00 % ± 0.00 (20-way 1-shot, 20 episodes")
    assert note.startswith("note: these weights were trained by split_rule=vinyals, with 236")
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["protocol"], record["queries"]) == ("lake", 1)
    assert record["official_trials"]["accuracy"] == 100
    for arguments, culprit in (
        ([f"--runs={path}"], "add --protocol=lake"),
        (["--protocol=lake", "--tasks.rotations=classes"], "leave rotations=classes out"),
    ):
        refused = command("evaluate", *weights, "--eval_episodes=2", *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert culprit in refused.stderr


def test_queries_in_chunks_are_for_learners_that_answer_each_alone():
    asked, given = Asked(episodes=2, query_chunk=7), {"tasks": "glyphs"}
    for name in ("fomaml_omniglot", "mann_omniglot"):
        with pytest.raises(UsageError, match=r"depend on the other queries.*leave query_chunk out"):
            folder_tests.evaluate(ledger.ROOT / "results/weights" / name, asked, **given)
    given |= {"size": {"ways": 10, "queries": 2}}
    found = folder_tests.evaluate(WEIGHTS, asked, **given).record
    assert found == folder_tests.evaluate(WEIGHTS, asked._replace(query_chunk=None), **given).record
