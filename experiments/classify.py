"""Classifies images by a few labelled examples, with weights that were trained before.

Nothing is trained: the learner adapts to the support images, one sub-folder for each class.

    python -m experiments.classify --support=FOLDER --query=FOLDER_OR_IMAGES
    python -m experiments.classify --weights=FOLDER --support=FOLDER --query='photos/*.jpg'
    python -m experiments.classify --workdir=runs/1 --support=FOLDER --query=FOLDER --evaluate

Prints a line for each image and writes predictions.csv, predictions.json and predictions.png; with
--evaluate, where the query folder has a sub-folder for each class, confusion.csv and confusion.png
too.
"""

import csv
import glob
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments.command_line import run_main
from experiments.weights import (
    DEFAULT,
    define_weights_flags,
    describe_weights,
    load_weights,
    named_weights,
)
from meta_jax.data.images import EXTENSIONS, is_image_file
from meta_jax.lookup import UsageError, local_path
from meta_jax.networks.normalisation import BATCH_MODES
from meta_jax.serving.classifier import Classifier
from meta_jax.training.evaluation import confidence_interval
from meta_jax.training.prediction_pictures import confusion_picture, evidence_picture
from meta_jax.training.writers import write_text

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this binary."""
    define_weights_flags(values, DEFAULT)
    flags.DEFINE_string(
        "support", None, "Folder with one sub-folder of labelled images for each class.", values
    )
    flags.DEFINE_list(
        "query", [], "Images to classify: a folder, files, or patterns such as a/*.png.", values
    )
    flags.DEFINE_enum(
        "normalisation",
        None,
        list(BATCH_MODES),
        "Moments that normalise the queries, by default as in training.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "polarity",
        None,
        ["ink_light", "ink_dark"],
        "Whether ink is light or dark, for weights trained on characters; each image tells by "
        "default.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "evaluate", False, "Whether the query folder's sub-folders are the true classes.", values
    )
    flags.DEFINE_string("output", "predictions", "Folder where predictions are written.", values)


class Found(NamedTuple):
    """Images found on the disk, with the class of each; None where it is not known."""

    paths: list[Path]
    labels: list[str | None]


def main(arguments: list[str]) -> None:
    """Adapts, classifies, prints and writes."""
    del arguments
    name = named_weights(FLAGS.workdir, FLAGS.weights) or DEFAULT
    model = load_weights(name, FLAGS.checkpoint)
    support, query = find_support(FLAGS.support), find_queries(FLAGS.query, FLAGS.evaluate)
    classes = class_names(sorted({str(label) for label in support.labels}))
    print(f"{describe_weights(name)}; {len(support.paths)} support images of {classes}")
    classifier = model.adapt(
        support.paths,
        support.labels,
        normalisation=FLAGS.normalisation,
        polarity=FLAGS.polarity,
    )
    check_truth(query, classifier)
    probabilities = classifier(query.paths)
    rows = predictions(classifier, query, probabilities)
    for row in rows:
        print(f"{row['image']}  {row['class']}  {row['probability']:.3f}  (+{row['margin']:.3f})")
    folder = local_path(FLAGS.output)
    write_predictions(folder, rows, classifier)
    draw_evidence(folder / "predictions.png", classifier, support, query, rows)
    if FLAGS.evaluate:
        print(write_evaluation(folder, classifier, query, probabilities))
    print(f"written to {folder}")


def class_names(names: Sequence[str], shown: int = 5) -> str:
    """How many classes there are, and what the first are called."""
    more = ["..."] if len(names) > shown else []
    return f"{len(names)} classes: {', '.join([*names[:shown], *more])}"


def find_support(folder: str | None) -> Found:
    """The labelled images of a folder of class folders.

    Raises:
      UsageError: there is no such folder, or it has fewer than two classes.
    """
    if not folder:
        raise UsageError("--support is missing: name a folder with one sub-folder for each class")
    found = _labelled(local_path(folder))
    if len(set(found.labels)) < 2:
        raise UsageError(
            f"--support={folder} has images of {len(set(found.labels))} class(es): put those of "
            "each class into a sub-folder of its own, at least 2"
        )
    return found


def find_queries(patterns: Sequence[str], evaluate: bool) -> Found:
    """The images to classify.

    Args:
      patterns: Folders, files and patterns.
      evaluate: Whether the images lie in folders of their classes.

    Raises:
      UsageError: there is no such image.
    """
    if not patterns or not all(patterns):
        raise UsageError(
            "--query is missing, or a name in it is empty: name a folder, images, or a pattern "
            "such as 'a/*.png'"
        )
    if evaluate:
        if len(patterns) > 1 or not Path(patterns[0]).is_dir():
            raise UsageError("--evaluate needs one --query folder with a sub-folder for each class")
        found = _labelled(local_path(patterns[0]))
        if not found.paths:
            raise UsageError(f"--query={patterns[0]} has no class folders: leave --evaluate out")
        return found
    paths = [path for pattern in patterns for path in _matching(pattern)]
    return Found(paths, [None] * len(paths))


def _labelled(folder: Path) -> Found:
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist: correct its name")
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    found = Found([], [])
    for each in classes:
        images = _images_in(each)
        found.paths.extend(images)
        found.labels.extend([each.name] * len(images))
    return found


def _images_in(folder: Path) -> list[Path]:
    """The images below a folder; what is none is passed over, and named once."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    images = [file for file in files if is_image_file(file)]
    if len(files) > len(images):
        others = [file for file in files if file not in images]
        print(
            f"left out of {folder}: {len(others)} file(s) that are no images, as {others[0].name}"
        )
    return images


def _matching(pattern: str) -> list[Path]:
    path = local_path(pattern)
    if path.is_dir():
        images = _images_in(path)
        if not images:
            raise UsageError(f"--query={pattern} has no images ({', '.join(EXTENSIONS)})")
        return images
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    images = [file for file in found if is_image_file(file)]
    if not images:
        raise UsageError(f"--query={pattern} matches no image: correct the name or the pattern")
    return images


def check_truth(query: Found, classifier: Classifier) -> None:
    """Refuses true classes that the support set does not have.

    Raises:
      UsageError: there are some.
    """
    unknown = sorted({label for label in query.labels if label} - set(classifier.classes))
    if unknown:
        raise UsageError(
            f"--query has the class folder(s) {', '.join(unknown)}, which --support has not: add "
            "examples of them or leave them out"
        )


def predictions(
    classifier: Classifier, query: Found, probabilities: np.ndarray
) -> list[dict[str, Any]]:
    """A row for each image: its class, the class's probability and its margin over the next.

    Args:
      classifier: The classifier.
      query: The images.
      probabilities: Probabilities [n, classes].
    """
    order = np.sort(probabilities, 1)
    rows = []
    for path, label, p, best in zip(query.paths, query.labels, probabilities, order, strict=True):
        row = {
            "image": str(path),
            "class": classifier.classes[p.argmax()],
            "probability": round(float(best[-1]), 6),
            "margin": round(float(best[-1] - best[-2]), 6),
        }
        rows.append(row | ({} if label is None else {"true": label}))
        rows[-1]["probabilities"] = dict(
            zip(classifier.classes, p.astype(float).round(6).tolist(), strict=True)
        )
    return rows


def write_predictions(folder: Path, rows: Sequence[dict[str, Any]], classifier: Classifier) -> None:
    """Writes predictions.csv, a column for each class, and predictions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = [
        {key: value for key, value in row.items() if key != "probabilities"}
        | {f"p({name})": value for name, value in row["probabilities"].items()}
        for row in rows
    ]
    write_text(folder / "predictions.csv", _csv([list(flat[0]), *[r.values() for r in flat]]))
    record = {"classes": list(classifier.classes), "images": list(rows)}
    write_text(folder / "predictions.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _csv(lines: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def draw_evidence(
    path: Path,
    classifier: Classifier,
    support: Found,
    query: Found,
    rows: Sequence[dict[str, Any]],
    limit: int = 12,
) -> None:
    """Draws each query beside the support images that speak for it, the first queries alone."""
    shown = query.paths[:limit]
    evidence_picture(
        shown,
        [f"{row['class']}  {row['probability']:.2f}" for row in rows[:limit]],
        support.paths,
        [str(label) for label in support.labels],
        classifier.influence(shown),
        path,
    )


def write_evaluation(
    folder: Path, classifier: Classifier, query: Found, probabilities: np.ndarray
) -> str:
    """Writes the confusion matrix as CSV and as a picture, and returns the accuracy as a line.

    Args:
      folder: Where to write.
      classifier: The classifier.
      query: The images with their true classes.
      probabilities: Probabilities [n, classes].
    """
    names = list(classifier.classes)
    truth = np.array([names.index(label) for label in query.labels])
    answers = probabilities.argmax(1)
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (truth, answers), 1)
    header = ["true \\ predicted", *names]
    body = [[name, *row] for name, row in zip(names, counts.tolist(), strict=True)]
    write_text(folder / "confusion.csv", _csv([header, *body]))
    confusion_picture(counts, names, folder / "confusion.png")
    right = 100.0 * (truth == answers)
    interval = f" ± {confidence_interval(right).ci95:.2f}" if len(right) > 1 else ""
    return f"accuracy {right.mean():.2f} %{interval} ({len(right)} images)"


if __name__ == "__main__":
    define_flags(FLAGS)
    run_main(main)
