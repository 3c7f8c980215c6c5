"""Image completion: an image is a function from places to colours (Garnelo et al. 2018)."""

import functools
import math

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, Batch, Episode, Objective, PyTree, Sample, Tasks
from meta_jax.data.source import EpisodeSize, TaskSource, find_source, load_source
from meta_jax.data.varying_sizes import with_random_shots
from meta_jax.lookup import UsageError
from meta_jax.objectives import as_objective
from meta_jax.ranges import PositiveInt
from meta_jax.registry import parameters


@registry.tasks(
    "image_completion",
    run={"shots": 100, "queries": 100, "task_batch": 16, "task_chunk": 16},
)
def image_completion(
    *,
    images: str = "glyphs",
    image_size: PositiveInt = 28,
    data_dir: str | None = None,
    least_shots: PositiveInt = 3,
    objective: Objective | str = "gaussian_likelihood",
) -> TaskSource:
    """Builds the source of images to be completed: each task is one image, its examples are pixels.

    An input is the place of a pixel, [2] in -1 to 1 (row, column); a target is its colour in 0 to
    1, [1] for grey images and [3] for coloured ones. The support set has some pixels of the image;
    in training others are the queries, in tests all pixels are, as in Garnelo et al. (2018).
    `ways` means nothing.

    Args:
      images: Task source of the images, such as glyphs, omniglot or folder:PATH; its splits are
        those of this source.
      image_size: Side of the images, in pixels.
      data_dir: Folder of the images, where their source has such a setting.
      least_shots: Smallest number of support pixels: each task has a random number of them, from
        this one up to `shots`, and padding in place of the others; `shots` of them where it is as
        large.
      objective: Objective of the tasks: gaussian_likelihood, squared_error, or somebody's own as
        package.module:attribute.

    Raises:
      UsageError: a source that has no images of this size, or a number below one. The source's
        `tasks` raises one where an image has fewer pixels than are asked for.
    """
    objective = as_objective(objective)
    inner = load_source(images, **_settings(images, image_size, data_dir))

    def tasks(split: str, size: EpisodeSize, *, train: bool) -> Tasks:
        drawn = inner.tasks(split, EpisodeSize(1, 1, 1), train=train)
        pixels = math.prod(_image_shape(drawn, images)[:2])
        asked = size.shots + size.queries if train else size.shots
        if asked > pixels:
            raise UsageError(
                f"shots and queries together are {asked}, and an image has {pixels} pixels: lower "
                "them or raise image_size"
            )
        queries = size.queries if train else pixels
        sample = functools.partial(
            _sample_pixels, drawn.sample, size.shots, queries, least_shots, train
        )
        return Tasks(sample, drawn.data, objective)

    return TaskSource(tasks, inner.splits, notes=inner.notes)


def _settings(images: str, image_size: int, data_dir: str | None) -> dict[str, int | str]:
    """Settings of the images' own source."""
    known = parameters(find_source(images)[0].factory)
    if "image_size" not in known:
        raise UsageError(f"tasks '{images}' have no images: name others in images")
    settings: dict[str, int | str] = {"image_size": image_size}
    if data_dir is not None:
        if "data_dir" not in known:
            raise UsageError(f"tasks '{images}' have no data_dir: leave it out")
        settings["data_dir"] = data_dir
    return settings


def _image_shape(tasks: Tasks, images: str) -> tuple[int, ...]:
    """Height, width and channels of a task's images."""
    episode = jax.eval_shape(tasks.sample, jax.random.key(0), tasks.data)
    shape = getattr(episode.support.x, "shape", ())
    if len(shape) != 4:
        raise UsageError(f"tasks '{images}' have no images: name others in images")
    return shape[1:]


def places(height: int, width: int) -> Array:
    """Rows and columns of all pixels of an image, in -1 to 1, [height width, 2].

    Examples:
      >>> places(1, 3).tolist()
      [[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]]
    """
    sides = [jnp.linspace(-1, 1, n) if n > 1 else jnp.zeros(1) for n in (height, width)]
    return jnp.stack(jnp.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)


def _sample_pixels(
    sample_image: Sample,
    shots: int,
    queries: int,
    least_shots: int,
    train: bool,
    key: Array,
    data: PyTree = (),
    /,
) -> Episode:
    image_key, order_key, shots_key = jax.random.split(key, 3)
    image = sample_image(image_key, data).support.x[0]
    height, width, channels = image.shape
    x, y = places(height, width).astype(image.dtype), image.reshape(-1, channels)
    order = jax.random.permutation(order_key, height * width)
    known = order[:shots]
    asked = order[shots : shots + queries] if train else jnp.arange(height * width)
    support = with_random_shots(shots_key, Batch(x[known], y[known]), least_shots)
    return Episode(support, Batch(x[asked], y[asked]))
