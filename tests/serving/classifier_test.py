"""Classifiers of somebody's own classes, from a trained learner."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import mixed_inputs, normalised

from meta_jax.core import Batch, Episode
from meta_jax.data.source import image_preprocessing
from meta_jax.lookup import UsageError
from meta_jax.metric_based.matching import matching
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.model_based.mann import mann
from meta_jax.objectives import cross_entropy, squared_error
from meta_jax.optimization_based.maml import maml
from meta_jax.serving.classifier import adapt_classifier
from meta_jax.serving.exported import load_exported
from meta_jax.serving.inputs import InputForm

SIZE = 4
RNG = np.random.default_rng(0)
IMAGES = RNG.random((5, SIZE, SIZE, 1), np.float32)
QUERIES = RNG.random((40, SIZE, SIZE, 1), np.float32)  # more than are answered at a time
LABELS = ["b", "a", "c", "a", "b"]  # unequal shots
FORM = InputForm(
    jax.ShapeDtypeStruct((SIZE, SIZE, 1), np.float32),
    image_preprocessing(SIZE, 1, polarity="as_is", resample="lanczos"),
)
LEARNERS = {
    "running": lambda: prototypical(normalised("running")),
    "one_at_a_time": lambda: maml(normalised("one_at_a_time"), inner_lr=0.1, steps=2),
    "batch": lambda: maml(normalised("batch"), inner_lr=0.1, steps=2),
    "support": lambda: mann(normalised("support"), hidden_size=5, num_slots=4, slot_size=3),
}


def initialised(learner, ways=3, images=IMAGES):
    batch = Batch(images, jnp.zeros((len(jax.tree.leaves(images)[0]), ways)).at[:, 0].set(1))
    return jax.jit(learner.init)(jax.random.key(3), Episode(batch, batch))


def classifier_of(name, images=IMAGES, labels=LABELS, ways=3):
    learner = LEARNERS[name]()
    params, state = initialised(learner, ways)
    return adapt_classifier(
        learner, params, state, cross_entropy, images, labels, form=FORM, name=name,
        normalisation=name,
    )  # fmt: skip


def plain_answers(classifier, support, x):
    """Operation by operation, without padding."""
    learner, key = classifier.learner, jax.random.key(0)
    adapted = learner.adapt(classifier.params, classifier.state, support, key, train=False)
    outputs, _ = learner.predict(classifier.params, adapted, x, key, train=False)
    return jax.nn.softmax(outputs)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_classifier_answers_as_its_learner(name):
    classifier = classifier_of(name)
    assert classifier.classes == ("a", "b", "c")
    assert classifier.support.y.argmax(1).tolist() == [1, 0, 2, 0, 1]
    found = classifier(QUERIES)
    assert found.shape == (40, 3)
    expected = plain_answers(classifier, classifier.support, QUERIES)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert classifier.predict(QUERIES) == [("a", "b", "c")[i] for i in expected.argmax(1)]
    alone = classifier(QUERIES[:1])
    if name == "batch":
        assert abs(alone - found[:1]).max() > 1e-3  # transductive, as the flag says
    else:
        np.testing.assert_allclose(alone, found[:1], atol=1e-6)


def test_influence_is_what_is_lost_without_an_example():
    classifier = classifier_of("one_at_a_time")
    found, whole = classifier.influence(QUERIES[:3]), classifier(QUERIES[:3])
    assert found.shape == (3, 5)
    for left_out in range(5):
        rest = np.delete(np.arange(5), left_out)
        support = Batch(classifier.support.x[rest], classifier.support.y[rest])
        fewer = plain_answers(classifier, support, QUERIES[:3])
        lost = [whole[i, k] - fewer[i, k] for i, k in enumerate(whole.argmax(1))]
        np.testing.assert_allclose(found[:, left_out], lost, atol=1e-5)


def test_labels_are_names_or_integers():
    assert classifier_of("running", labels=[10, 2, 10, 2, 7]).classes == (2, 7, 10)
    assert classifier_of("running", labels=np.array(["é f", "g"] * 2 + ["g"])).classes == (
        "g",
        "é f",
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a"] * 5, "at least 2"),
        (["a", "b"], "5 inputs and 2 labels"),
        (["a", "a"], "5 inputs and 2 labels"),
        ([], "5 inputs and 0 labels"),
        (np.eye(5), "one name or integer"),
        ([0.5, 1, 2, 3, 4], "one name or integer"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        classifier_of("running", labels=labels)


def test_a_head_of_one_size_says_so():
    with pytest.raises(UsageError, match=r"another number of classes than the 3 given.*prototyp"):
        classifier_of("one_at_a_time", ways=5)
    assert classifier_of("running", ways=5).classes == ("a", "b", "c")


def test_regression_is_refused():
    learner = maml(normalised("none"), objective=squared_error)
    with pytest.raises(UsageError, match="a classifier is for classification"):
        adapt_classifier(learner, {}, {}, squared_error, IMAGES, LABELS, form=FORM)


def test_inputs_may_be_dictionaries():
    x = {"ids": np.arange(12).reshape(4, 3) % 5, "real": np.ones((4, 3), bool)}
    form = InputForm(
        {"ids": jax.ShapeDtypeStruct((3,), np.int32), "real": jax.ShapeDtypeStruct((3,), bool)},
        None,
    )
    learner = matching(mixed_inputs())
    params, state = initialised(learner, images=x)
    classifier = adapt_classifier(learner, params, state, cross_entropy, x, [0, 1, 0, 1], form=form)
    assert classifier(x).argmax(1).tolist() == [0, 1, 0, 1]


@pytest.mark.usefixtures("optimized")
def test_an_export_answers_alike_where_meta_jax_is_not_installed(tmp_path):
    classifier = classifier_of("running")
    folder = classifier.export(tmp_path / "export")
    assert len((folder / "README.md").read_text().splitlines()) <= 13
    found = load_exported(folder)
    assert found.classes == classifier.classes
    np.testing.assert_allclose(found(QUERIES), classifier(QUERIES), atol=1e-6)
    np.testing.assert_allclose(
        found([QUERIES[0], QUERIES[1] * 0.5]), classifier([QUERIES[0], QUERIES[1] * 0.5]), atol=1e-6
    )
    np.save(tmp_path / "x.npy", QUERIES)
    code = """
import sys
sys.modules["meta_jax"] = None  # an import of it fails
import jax, json, numpy as np
program = jax.export.deserialize(bytearray(open("export/classifier.bin", "rb").read()))
np.save("answers.npy", jax.jit(program.call)(np.load("x.npy")))
print(json.load(open("export/classifier.json"))["classes"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "['a', 'b', 'c']"
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), classifier(QUERIES), atol=1e-6)


def test_an_export_overwrites_nothing_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    classifier = classifier_of("running")
    with pytest.raises(UsageError, match="holds no export"):
        classifier.export(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(UsageError, match="no export in"):
        load_exported(tmp_path)
    classifier.export(tmp_path / "new")
    classifier.export(tmp_path / "new")  # its own is replaced
    (tmp_path / "new" / "classifier.bin").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="damaged"):
        load_exported(tmp_path / "new")
    record = json.loads((tmp_path / "new" / "classifier.json").read_text())
    assert record["input"]["preprocessing"]["image_size"] == SIZE
