"""A local page on which examples of a few classes are drawn or uploaded, and new ones classified.

Nothing is trained: the learner adapts to the examples. The page listens on this machine alone.

    python -m experiments.demo
    python -m experiments.demo --weights=FOLDER --port=8000

Gradio must be installed: pip install 'meta_jax[demo]'.
"""

from absl import flags

from experiments.command_line import run_main
from experiments.demo.answers import Settings, load_image_weights
from experiments.demo.page import serve
from experiments.weights import DEFAULT, define_weights_flags, named_weights
from meta_jax.training.trained import pretrained_names

FLAGS = flags.FLAGS
define_weights_flags(FLAGS, DEFAULT)
flags.DEFINE_integer("port", 7860, "Port of the page on this machine.", 1, 65535)


def main(arguments: list[str]) -> None:
    """Loads the weights, so that a mistake is told at once, and serves the page."""
    del arguments
    name = named_weights(FLAGS.workdir, FLAGS.weights) or DEFAULT
    load_image_weights(name, FLAGS.checkpoint)
    choices = list(dict.fromkeys([name, *pretrained_names()]))
    serve(choices, Settings(name, checkpoint=FLAGS.checkpoint), FLAGS.port)


if __name__ == "__main__":
    run_main(main)
