"""experiments.classify: images of new classes from a few labelled ones."""

import csv
import json
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import classify
from meta_jax.core import Batch, Episode, Tasks
from meta_jax.data.source import image_preprocessing
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.optimization_based.maml import maml
from meta_jax.training.record import make_config
from meta_jax.training.trained import Trained, save_trained

SIZE = 8
SHADES = {"dark": 20, "middle": 120, "light ö": 230}


def weights(folder, learner, ways=3):
    """Untrained weights: shades of grey are told apart by any network."""
    batch = Batch(np.zeros((ways, SIZE, SIZE, 1), np.float32), np.eye(ways, dtype=np.float32))
    tasks = Tasks(lambda key, data: Episode(batch, batch), (), cross_entropy)
    params, state = learner.init(jax.random.key(0), Episode(batch, batch))
    form = image_preprocessing(SIZE, 1, polarity="as_is", resample="lanczos")
    config = make_config(learner, tasks, preprocessing=form)
    save_trained(folder, Trained(learner, params, state, cross_entropy, form, config))
    return folder


@pytest.fixture(scope="module")
def prototypes(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("weights") / "prototypes", prototypical(mlp((8, 8))))


def image(path, shade, side=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), shade, np.uint8)).save(path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Support folders with unequal shots, and queries of several sizes and formats."""
    for name, shade in SHADES.items():
        for i in range(1 + (name == "dark")):
            image(tmp_path / "support" / name / f"{i}.png", shade + i, side=10 + 30 * i)
        image(tmp_path / "queries" / name / "a b.PNG", shade - 5)
        image(tmp_path / "queries" / name / "b.bmp", shade + 5, side=33)
    (tmp_path / "support" / "dark" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    values = flags.FlagValues()
    classify.define_flags(values)
    values(["classify", *map(str, arguments)])
    with mock.patch.object(classify, "FLAGS", values):
        classify.main([])


def test_of_many_classes_some_are_named():
    assert classify.class_names(["a", "b", "c"], shown=2) == "3 classes: a, b, ..."


def test_every_image_gets_a_class_in_print_and_in_files(photos, prototypes, capsys):
    run(f"--weights={prototypes}", "--support=support", "--query=queries")
    out = capsys.readouterr().out
    assert "4 support images of 3 classes: dark, light ö, middle" in out
    assert "left out of support/dark: 1 file(s) that are no images, as notes.txt" in out
    text = (photos / "predictions" / "predictions.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 6
    for row in rows:
        assert f"/{row['class']}/" in row["image"]
        assert f"{row['image']}  {row['class']}" in out
        shares = sorted((float(row[f"p({name})"]) for name in SHADES), reverse=True)
        assert abs(sum(shares) - 1) < 1e-5
        assert float(row["probability"]) == shares[0]
        assert abs(float(row["margin"]) - (shares[0] - shares[1])) < 2e-6
    record = json.loads((photos / "predictions" / "predictions.json").read_text())
    assert [each["class"] for each in record["images"]] == [row["class"] for row in rows]
    with Image.open(photos / "predictions" / "predictions.png") as picture:
        assert picture.width > 400


def test_queries_are_a_folder_files_or_a_pattern(photos, prototypes, capsys):
    weighed = (f"--weights={prototypes}", "--support=support", "--output=out")
    run(*weighed, "--query=queries/*/*.PNG")
    assert capsys.readouterr().out.count("a b.PNG") == 3
    run(*weighed, "--query=queries/dark/b.bmp,queries/middle/b.bmp")
    assert capsys.readouterr().out.count("b.bmp") == 2


def test_true_classes_are_counted(photos, prototypes, capsys):
    image(photos / "queries" / "dark" / "wrong.png", 225)  # dark in name alone
    run(f"--weights={prototypes}", "--support=support", "--query=queries", "--evaluate")
    assert "accuracy 85.71 % ± 28.00 (7 images)" in capsys.readouterr().out
    text = (photos / "predictions" / "confusion.csv").read_text()
    table = list(csv.reader(text.splitlines()))
    assert table[0] == ["true \\ predicted", "dark", "light ö", "middle"]
    assert table[1:] == [
        ["dark", "2", "1", "0"],
        ["light ö", "0", "2", "0"],
        ["middle", "0", "0", "2"],
    ]
    assert (photos / "predictions" / "confusion.png").stat().st_size > 1000


def test_a_fixed_head_and_a_transductive_method_say_what_they_need(photos, tmp_path):
    folder = weights(tmp_path / "maml", maml(mlp((4,)), steps=1), ways=5)
    with pytest.raises(UsageError, match="maml was trained for another number of classes than the"):
        run(f"--weights={folder}", "--support=support", "--query=queries")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--query=queries"], "--support is missing"),
        (["--support=support"], "--query is missing"),
        (["--support=nowhere", "--query=queries"], "nowhere does not exist"),
        (["--support=support/dark", "--query=queries"], "0 class"),
        (["--support=support", "--query=empty*"], "matches no image"),
        (["--support=support", "--query=a.png,b.png", "--evaluate"], "needs one --query folder"),
        (["--support=support", "--query=queries/dark", "--evaluate"], "no class folders"),
        (["--support=support", "--query=q", "--weights=a", "--workdir=b"], "once"),
        (["--support=support", "--query=queries", "--weights=nowhere"], "config.json in nowhere"),
    ],
)
def test_mistakes_name_the_culprit(photos, arguments, message):
    with pytest.raises(UsageError, match=message):
        run(*arguments)


def test_a_true_class_without_support_is_named(photos, prototypes):
    image(photos / "queries" / "purple" / "0.png", 90)
    with pytest.raises(UsageError, match="purple"):
        run(f"--weights={prototypes}", "--support=support", "--query=queries", "--evaluate")
    assert not (photos / "predictions").exists()
