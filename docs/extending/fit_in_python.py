"""Training from Python, with one's own arrays: validation, checkpoints, and loading afterwards.

python -m docs.extending.fit_in_python
"""

from pathlib import Path

import jax
import numpy as np
import optax

import meta_jax as mj

SIZE = mj.data.EpisodeSize(ways=5, shots=1, queries=10)
STEPS = mj.training.LoopConfig(steps=200, log_every=50, eval_every=100, checkpoint_every=100)


def clouds(classes: int, seed: int) -> mj.data.Dataset:
    """Makes 20 examples of each class: two numbers that matter among 30 that do not."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), 20)
    centres = rng.normal(size=(classes, 2)) * 3
    x = rng.normal(size=(len(labels), 32)).astype(np.float32)
    x[:, :2] = centres[labels] + 0.3 * x[:, :2]
    return mj.dataset_from_arrays(x, labels)


def train(workdir: Path | str, config: mj.training.LoopConfig = STEPS) -> mj.training.FitResult:
    """Trains a Prototypical Network on clouds, with a checkpoint of the best on validation.

    Args:
      workdir: Folder for checkpoints, metrics and the record; an old run is resumed.
      config: Numbers of steps.

    Returns:
      The last state, and `history`: metrics by split as arrays.
    """
    source = mj.data.source_from_splits({"train": clouds(100, 0), "val": clouds(30, 1)})
    tasks = source.tasks("train", SIZE, train=True)
    learner = mj.prototypical(mj.mlp((32,)), objective=tasks.objective)
    optimizer = optax.adam(1e-2)
    step = mj.make_outer_step(learner, optimizer, tasks.sample, task_batch=4)
    # The record lets `mj.load` build the learner again.
    mj.training.write_config(workdir, mj.training.make_config(learner, tasks))
    return mj.fit(
        mj.init_train_state(learner, optimizer, tasks, seed=0),
        mj.make_train_loop(step),
        tasks.data,
        config=config,
        workdir=workdir,
        tasks_per_step=4,
        validate=mj.training.make_validate(
            learner, source.tasks("val", SIZE, train=False), episodes=50
        ),
        objective=tasks.objective,
        learner_config=learner.config,
    )


def classify(workdir: Path | str) -> float:
    """Loads the best checkpoint and classifies new clouds; returns the share that is right."""
    model, data = mj.load(workdir), clouds(3, 2)
    x, label = np.asarray(data.examples), np.repeat(np.arange(3), 20)
    shown = np.arange(60) % 20 < 2  # two examples of each class
    classifier = model.adapt(x[shown], label[shown])
    return float(np.mean(np.array(classifier.predict(x[~shown])) == label[~shown]))


if __name__ == "__main__":
    history = train("runs/fit_in_python").history
    print("validation accuracy:", history["val"]["accuracy"])
    print("of new classes right:", classify("runs/fit_in_python"), "on", jax.default_backend())
