import numpy as np
import pytest
from PIL import Image

from meta_jax.data.dataset import DataError
from meta_jax.data.omniglot_trials import load_trials
from tests.omniglot_runs import (
    RUNS,
    WAYS,
    answer,
    contents,
    drawing,
    png,
    write_folder,
    write_zip,
)


def refused(path, message):
    with pytest.raises(DataError, match=message) as error:
        load_trials(path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    junk = {"__MACOSX/run01/class_labels.txt": b"junk"}
    return write_zip(tmp_path_factory.mktemp("trials") / "all_runs.zip", contents() | junk)


def test_every_trial_is_there_with_its_answer(archive):
    (x, one_each, _), (queries, y, mask) = load_trials(archive)
    assert x.shape == queries.shape == (RUNS, WAYS, 28, 28, 1)
    assert mask is None
    for run in (1, 7, 20):
        np.testing.assert_array_equal(one_each[run - 1], np.eye(WAYS))
        answers = [answer(run, item) for item in range(WAYS)]
        np.testing.assert_array_equal(y[run - 1].argmax(1), answers)
        assert (y[run - 1].sum(1) == 1).all()
        # Here, and only here, a test image is the training image of its class.
        np.testing.assert_array_equal(queries[run - 1], x[run - 1][answers])


def test_images_are_those_of_training(archive):
    support = load_trials(archive).support
    grey = Image.fromarray(drawing(3, 4)).convert("L").resize((28, 28), Image.LANCZOS)
    np.testing.assert_allclose(support.x[2, 4, ..., 0], 1 - np.asarray(grey) / 255, atol=1e-6)
    dark = load_trials(archive, image_size=21, polarity="ink_dark").support.x
    assert dark.shape[2:] == (21, 21, 1)
    np.testing.assert_allclose(dark, 1 - load_trials(archive, image_size=21).support.x, atol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "listed"), [("", ""), ("all_runs/", ""), ("all_runs/", "all_runs/"), ("", "x/y/")]
)
def test_a_folder_gives_the_same_wherever_it_was_unpacked(archive, tmp_path, prefix, listed):
    found = load_trials(write_folder(tmp_path, contents(prefix, listed)))
    expected = load_trials(archive)
    for a, b in zip(
        (*found.support[:2], *found.query[:2]),
        (*expected.support[:2], *expected.query[:2]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_what_is_no_archive_of_the_trials_is_refused(archive, tmp_path):
    refused(tmp_path / "nowhere", "nowhere is neither a folder nor a zip")
    refused(tmp_path, "has 0 folders run01, run02, .* not 20: get all_runs.zip")
    (tmp_path / "cut.zip").write_bytes(archive.read_bytes()[:5000])
    refused(tmp_path / "cut.zip", "cut.zip is truncated or corrupt")
    files = contents()
    labels = files["run02/class_labels.txt"].decode().splitlines()
    for changed, message in (
        ({"run02/test/item07.png": None}, "has no readable run02/test/item07.png"),
        ({"run02/class_labels.txt": None}, "has 19 folders"),
        ({"run02/class_labels.txt": labels[1:]}, "pairs 19 test images with 19 classes, not 20"),
        ({"run02/class_labels.txt": [*labels, labels[0]]}, "run02/class_labels.txt pairs 20 test"),
        ({"run02/class_labels.txt": ["one"]}, "no pairs of paths"),
        ({"run02/test/item07.png": png(drawing(1, 1))[:50]}, "item07.png does not decode"),
    ):
        broken = {**files, **changed}
        for name, value in changed.items():
            if value is None:
                del broken[name]
            elif isinstance(value, list):
                broken[name] = "\n".join(value).encode()
        refused(write_zip(tmp_path / "broken.zip", broken), message)
