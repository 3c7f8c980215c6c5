import io
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from meta_jax.core import Batch, Episode, Objective
from meta_jax.objectives import Gaussian, cross_entropy, squared_error
from meta_jax.training import figures, pictures
from meta_jax.training.evaluation import MeanCI

GREEN, RED = (0x2A, 0x9D, 0x3F), (0xD6, 0x27, 0x28)


def image_episode(ways=3, shots=2, queries=4, channels=1, seed=0):
    rng = np.random.default_rng(seed)

    def batch(each):
        x = rng.normal(size=(ways * each, 8, 8, channels)).astype(np.float32)
        return Batch(jnp.asarray(x), jnp.eye(ways)[np.repeat(np.arange(ways), each)])

    return Episode(batch(shots), batch(queries))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def frames(path, colour):
    """How many pixels have a frame's colour."""
    return int((pixels(path) == colour).all(-1).sum())


def test_frames_tell_right_from_wrong(tmp_path):
    episode = image_episode()
    labels = episode.query.y
    one_wrong = labels.at[0].set(jnp.roll(labels[0], 1))
    for name, predictions in (("right", labels), ("one", one_wrong), ("none", None)):
        pictures.episode_picture(episode, predictions, tmp_path / name)
    assert frames(tmp_path / "right", RED) == 0
    assert frames(tmp_path / "one", RED) > 0
    # Eleven of the twelve green frames are left (their corners' antialiasing blurs the ratio).
    ratio = frames(tmp_path / "one", GREEN) / frames(tmp_path / "right", GREEN)
    assert ratio == pytest.approx(11 / 12, abs=0.03)
    assert frames(tmp_path / "none", GREEN) == frames(tmp_path / "none", RED) == 0


def test_padding_is_not_drawn(tmp_path):
    """Whatever stands in it: a label, and a wrong answer."""
    episode = image_episode()
    mask = jnp.arange(len(episode.query.y)) > 0
    padded = episode._replace(query=episode.query._replace(mask=mask))
    wrong_there = episode.query.y.at[0].set(jnp.array([0.0, 1.0, 0.0]))
    pictures.episode_picture(padded, wrong_there, tmp_path / "padded")
    pictures.episode_picture(episode, wrong_there, tmp_path / "whole")
    assert frames(tmp_path / "padded", RED) == 0
    assert frames(tmp_path / "whole", RED) > 0


def test_padding_is_not_drawn_in_a_curve(tmp_path):
    x = jnp.linspace(-5, 5, 40)[:, None]
    whole = Episode(Batch(x[::8], jnp.sin(x[::8])), Batch(x, jnp.sin(x)))
    rubbish = jnp.full((3, 1), 9.0)
    padded = Episode(
        *(
            Batch(
                *(jnp.concatenate([a, rubbish]) for a in batch[:2]),
                jnp.arange(len(batch.x) + 3) < len(batch.x),
            )
            for batch in whole
        )
    )
    pictures.episode_picture(whole, whole.query.y, tmp_path / "whole")
    pictures.episode_picture(padded, padded.query.y, tmp_path / "padded")
    np.testing.assert_array_equal(pixels(tmp_path / "whole"), pixels(tmp_path / "padded"))


def test_images_of_any_range_are_drawn_alike(tmp_path):
    episode = image_episode(channels=3)
    scaled = Episode(*(Batch(batch.x * 64 - 128, batch.y) for batch in episode))
    for name, drawn in (("a", episode), ("b", scaled)):
        pictures.episode_picture(drawn, None, tmp_path / name)
    difference = pixels(tmp_path / "a").astype(int) - pixels(tmp_path / "b")
    assert abs(difference).max() <= 1


def test_blank_images_and_a_single_query_are_drawn(tmp_path):
    episode = image_episode(ways=1, shots=1, queries=1)
    blank = Episode(*(Batch(jnp.zeros_like(batch.x), batch.y) for batch in episode))
    pictures.episode_picture(blank, jnp.ones((1, 1)), tmp_path / "picture")
    assert frames(tmp_path / "picture", GREEN) > 0


def test_regression_curve_is_drawn_whatever_the_order_of_its_queries(tmp_path):
    x = jnp.linspace(-5, 5, 40)[:, None]
    shuffled = np.random.default_rng(0).permutation(40)
    support = Batch(x[::8], jnp.sin(x[::8]))
    for name, order in (("sorted", np.arange(40)), ("shuffled", shuffled)):
        query = Batch(x[order], jnp.sin(x[order]))
        prediction = jnp.sin(x[order] + 0.3)
        pictures.episode_picture(Episode(support, query), prediction, tmp_path / name)
        pictures.episode_picture(Episode(support, query), None, tmp_path / f"{name} alone")
    np.testing.assert_array_equal(pixels(tmp_path / "sorted"), pixels(tmp_path / "shuffled"))
    assert (pixels(tmp_path / "sorted") != pixels(tmp_path / "sorted alone")).any()


class TestFunctions:
    X = jnp.linspace(-2.0, 2.0, 40)[:, None]
    EPISODE = Episode(Batch(X[::8], jnp.sin(X[::8])), Batch(X, jnp.sin(X)))
    SURE = Gaussian(jnp.sin(X), jnp.full_like(X, 0.1))

    def draw(self, path, *functions):
        pictures.functions_picture([pictures.DrawnFunction(*each) for each in functions], path)
        return pixels(path)

    def test_a_prediction_that_is_less_sure_has_a_wider_band(self, tmp_path):
        def coloured(predictions):
            path = tmp_path / "picture"
            pictures.episode_picture(self.EPISODE, predictions, path)
            return (np.ptp(pixels(path).astype(int), axis=-1) > 20).sum()

        bands = [self.SURE.mean, self.SURE, self.SURE._replace(scale=3 * self.SURE.scale)]
        areas = [coloured(prediction) for prediction in bands]
        assert areas == sorted(areas)
        assert len(set(areas)) == 3

    def test_the_exact_answer_is_drawn_where_it_is_known(self, tmp_path):
        alone = self.draw(tmp_path / "alone", (self.EPISODE, self.SURE))
        beside = self.draw(tmp_path / "beside", (self.EPISODE, self.SURE, self.SURE))
        assert beside.shape == alone.shape
        assert (beside.max(-1) < 60).sum() > (alone.max(-1) < 60).sum()

    def test_several_stand_side_by_side(self, tmp_path):
        one = (self.EPISODE, self.SURE, self.SURE)
        assert self.draw(tmp_path / "three", one, one, one).shape[1] > 1600
        with pytest.raises(ValueError, match="no functions to draw"):
            pictures.functions_picture([], tmp_path / "none")
        batch = Batch(jnp.zeros((2, 5)), jnp.ones((2, 1)))
        with pytest.raises(ValueError, match=r"shape \(2, 5\) cannot be drawn"):
            self.draw(tmp_path / "none", (Episode(batch, batch),))


def test_other_inputs_are_refused(tmp_path):
    batch = Batch(jnp.zeros((2, 5)), jnp.eye(2))
    with pytest.raises(ValueError, match=r"shape \(2, 5\) cannot be drawn"):
        pictures.episode_picture(Episode(batch, batch), None, tmp_path / "picture")
    tokens = Batch({"ids": jnp.zeros((2, 5), int)}, jnp.eye(2))
    with pytest.raises(ValueError, match="cannot be drawn"):
        pictures.episode_picture(Episode(tokens, tokens), None, tmp_path / "picture")
    assert list(tmp_path.iterdir()) == []


def lines(splits, **metrics):
    """Three lines for each split; metrics are functions of the step."""
    return [
        {"step": step, "split": split, **{name: f(step) for name, f in metrics.items()}}
        for step in (1, 2, 3)
        for split in splits
    ]


def test_the_training_loss_has_a_panel_to_itself():
    """It may be half a squared distance, or a loss of pairs; validation's is the objective's."""
    found = [
        *lines(["train"], loss=lambda step: 1e5 / step),
        *lines(["val", "test"], loss=lambda step: 1 / step, accuracy=lambda step: step / 4),
    ]
    panels = pictures._panels(found, cross_entropy)
    assert {label: list(curves) for label, curves in panels.items()} == {
        "training loss": ["train"],
        "validation loss": ["val", "test"],
        "accuracy (%)": ["val", "test"],
    }
    steps, values = panels["accuracy (%)"]["val"]
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [25, 50, 75])
    np.testing.assert_allclose(panels["training loss"]["train"][1], [1e5, 5e4, 1e5 / 3])


def test_a_metric_that_is_the_loss_is_drawn_once():
    found = lines(["train", "val"], loss=lambda step: 1 / step, mse=lambda step: 1 / step)
    assert list(pictures._panels(found, squared_error)) == ["training loss", "mse"]


def test_a_metric_of_ones_own_is_drawn_as_it_is():
    found = lines(["val"], loss=lambda step: 1.0, mean_absolute_error=lambda step: 1 / step)
    panels = pictures._panels(found, Objective(None, "mean_absolute_error", False))
    assert list(panels) == ["validation loss", "mean absolute error"]
    np.testing.assert_allclose(panels["mean absolute error"]["val"][1], [1, 1 / 2, 1 / 3])


def test_learning_curve_has_its_panels_side_by_side(tmp_path):
    loss = lines(["train"], loss=lambda step: 1 / step)
    validation = lines(["val"], loss=lambda step: 2 / step, accuracy=lambda step: step / 4)
    one, three = tmp_path / "deeper" / "loss.png", tmp_path / "all.png"
    pictures.learning_curve(loss, one, objective=cross_entropy)
    pictures.learning_curve(loss + validation, three, objective=cross_entropy)
    assert pixels(three).shape[1] == 3 * pixels(one).shape[1]
    with pytest.raises(ValueError, match="no loss or mse to draw"):
        pictures.learning_curve(
            [{"step": 1, "split": "train"}], tmp_path / "none.png", objective=squared_error
        )


def test_a_figure_is_returned_and_written_only_where_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    curve = [{"step": 1, "split": "train", "loss": 1.0}]
    figure = pictures.learning_curve(curve, objective=cross_entropy)
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss"]
    assert list(tmp_path.iterdir()) == []
    # A notebook shows the same picture.
    pictures.learning_curve(curve, tmp_path / "curve.png", objective=cross_entropy)
    np.testing.assert_array_equal(
        pixels(io.BytesIO(figure._repr_png_())), pixels(tmp_path / "curve.png")
    )


def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_bytes(b"old")

    def refuse(*args):
        raise OSError("no space left")

    monkeypatch.setattr(figures.os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        pictures.learning_curve(
            [{"step": 1, "split": "train", "loss": 1.0}], path, objective=cross_entropy
        )
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path):
    code = """
import sys
from meta_jax.objectives import cross_entropy
from meta_jax.training import pictures
assert "matplotlib" not in sys.modules
line = {"step": 1, "split": "train", "loss": 1.0}
pictures.learning_curve([line], sys.argv[1], objective=cross_entropy)
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "curve.png"], check=True)


def test_instance_curves_differ_where_the_scores_do(tmp_path):
    rising = [MeanCI(20.0 + 7 * i, 1.0) for i in range(10)]
    pictures.instance_curve({"trained": rising, "untrained": rising[:1] * 10}, tmp_path / "two")
    pictures.instance_curve({"trained": rising}, tmp_path / "one")
    assert (pixels(tmp_path / "two") != pixels(tmp_path / "one")).any()
    with pytest.raises(ValueError, match="no instances"):
        pictures.instance_curve({"trained": []}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_loss_curves_differ_where_the_losses_do(tmp_path):
    falling = [MeanCI(1 / step, 0.1) for step in range(1, 9)]
    pictures.loss_curves({"ours": falling, "adam": falling[:1] * 8}, tmp_path / "two")
    pictures.loss_curves({"ours": falling}, tmp_path / "one")
    assert (tmp_path / "two").read_bytes() != (tmp_path / "one").read_bytes()
    with pytest.raises(ValueError, match="no losses"):
        pictures.loss_curves({"ours": []}, tmp_path / "none")
