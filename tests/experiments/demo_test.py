"""experiments.demo without a browser and without Gradio: drawings, examples, answers, mistakes."""

import asyncio
import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import weights
from experiments.demo import answers, page, sketchpad
from experiments.demo.answers import Picture, Settings
from meta_jax.core import Batch, Episode, Tasks
from meta_jax.data.source import image_preprocessing
from meta_jax.lookup import UsageError
from meta_jax.metric_based.prototypical import prototypical
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy
from meta_jax.training.record import make_config
from meta_jax.training.trained import Trained, save_trained

SIZE = 8
CORNER = "M60 40L60 200L180 200"
CROSS = "M40 120L200 120M120 40L120 200"
SQUARE = "M40 40L200 40L200 200L40 200L40 40"
DEFAULT = Settings("omniglot-prototypical")


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Settings with untrained weights: shades of grey are told apart by any network."""
    folder = tmp_path_factory.mktemp("weights")
    learner = prototypical(mlp((8, 8)))
    batch = Batch(np.zeros((3, SIZE, SIZE, 1), np.float32), np.eye(3, dtype=np.float32))
    tasks = Tasks(lambda key, data: Episode(batch, batch), (), cross_entropy)
    params, state = learner.init(jax.random.key(0), Episode(batch, batch))
    form = image_preprocessing(SIZE, 1, polarity="as_is", resample="lanczos")
    config = make_config(learner, tasks, preprocessing=form)
    save_trained(folder, Trained(learner, params, state, cross_entropy, form, config))
    return Settings(str(folder))


def grey(shade, label="", side=SIZE):
    image = Image.fromarray(np.full((side, side), shade, np.uint8))
    return Picture(image, f"{shade}.png", drawn=False, label=label)


def last(results):
    return list(results)[-1]


def moved(drawing, scale, shift):
    """A drawing, smaller and elsewhere."""
    lines = sketchpad.strokes(drawing)
    return "".join(
        f"M{'L'.join(f'{round(x * scale) + shift} {round(y * scale) + shift}' for x, y in line)}"
        for line in lines
    )


# ---- Drawings.


def test_a_drawing_is_the_same_wherever_and_however_large_it_is_drawn():
    whole, small = sketchpad.draw(CROSS), sketchpad.draw(moved(CROSS, 0.5, 90))
    assert whole.size[0] == whole.size[1] > small.size[0] == small.size[1]

    def ink(image):
        return np.asarray(image.resize((28, 28)), float) / 255

    # The pen is as thick, so that the small one's strokes are thicker by their share.
    assert np.abs(ink(whole) - ink(small)).mean() < 0.1
    assert np.abs(ink(whole) - ink(sketchpad.draw(moved(CROSS, 1, 25)))).max() < 0.01


def test_ink_fills_as_much_of_the_box_as_of_omniglots_characters():
    pixels = np.asarray(sketchpad.draw(SQUARE))
    rows = np.flatnonzero((pixels < 128).any(1))
    assert 0.58 < (rows[-1] - rows[0] + 1) / len(pixels) < 0.66
    assert (pixels[0] == 255).all() and (pixels[:, -1] == 255).all()


def test_a_dot_stays_a_dot_and_ink_at_the_edge_is_whole():
    dot = np.asarray(sketchpad.draw("M140 140L140 140"))
    assert 0 < (dot < 128).mean() < 0.05
    at_edge = np.asarray(sketchpad.draw("M0 0L0 0"))
    np.testing.assert_array_equal(at_edge, dot)


@pytest.mark.parametrize("nothing", [None, "", "M", "MNaN"])
def test_an_empty_drawing_is_no_example(nothing):
    assert sketchpad.draw(nothing) is None
    with pytest.raises(UsageError, match="the drawing is empty"):
        answers.add_drawing([], "a", nothing)


# ---- Examples.


def test_drawings_and_files_become_examples(tmp_path):
    for name, mode in {"grey.png": "L", "colour.jpg": "RGB", "palette.gif": "P"}.items():
        Image.new(mode, (40, 30)).save(tmp_path / name)
    examples = answers.add_drawing([], "  a  b ", CORNER)
    examples, mistake = answers.add_files(examples, "c", sorted(map(str, tmp_path.iterdir())))
    assert [(example.label, example.drawn) for example in examples] == [
        ("a b", True),
        *[("c", False)] * 3,
    ]
    assert mistake == ""
    assert answers.summary(examples) == "4 examples of 2 classes: a b (1), c (3)"


def test_a_file_that_is_no_image_is_named_and_the_others_are_kept(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "x.png").write_text("no image")
    paths = [str(tmp_path / "x.png"), str(tmp_path / "a.png")]
    examples, mistake = answers.add_files([], "a", paths)
    assert [example.name for example in examples] == ["a.png"]
    assert mistake.startswith("x.png does not decode as an image")
    assert "\n" not in mistake


def test_a_class_needs_a_name():
    with pytest.raises(UsageError, match="the class has no name"):
        answers.add_drawing([], "  ", CORNER)


def test_large_images_are_kept_small_in_their_own_proportions(tmp_path):
    Image.effect_noise((1500, 600), 50).save(tmp_path / "a.png")
    picture = answers.from_file(str(tmp_path / "a.png"))
    assert picture.image.size == (512, 205)
    assert answers.thumbnail(picture).size == (128, 51)
    assert answers.reduced(Image.new("RGBA", (30, 10)), 128).getpixel((0, 0)) == (255, 255, 255)


# ---- Answers.


def test_the_shipped_default_tells_drawn_characters(optimized):
    """One drawing of each class; then each again, smaller and elsewhere."""
    examples = []
    for label, drawing in {"corner": CORNER, "cross": CROSS, "square": SQUARE}.items():
        examples = answers.add_drawing(examples, label, drawing)
    for example, drawing in zip(examples, (CORNER, CROSS, SQUARE), strict=True):
        query = answers.from_drawing(moved(drawing, 0.6, 70))
        first, whole = answers.answer(examples, query, DEFAULT)
        assert first.probabilities == whole.probabilities and not first.speakers
        assert whole.probabilities[example.label] > 0.9
        assert abs(sum(whole.probabilities.values()) - 1) < 1e-5
        assert whole.speakers[0][1].endswith(example.label)


def test_uploaded_images_are_told_by_weights_in_a_folder(shades):
    examples = [grey(20, "dark"), grey(230, "light", 30), grey(225, "light")]
    answer = last(answers.answer(examples, grey(30), shades))
    assert max(answer.probabilities, key=answer.probabilities.get) == "dark"
    assert [caption.split()[1] for _, caption in answer.speakers] == ["dark"]


def test_speakers_are_in_the_order_of_their_influence():
    examples = [grey(0, label) for label in "abba"] + [grey(0, "c")] * 9
    influence = np.array([0.2, -0.3, 0.31, -1e-9, *[0.004] * 9])
    captions = [caption for _, caption in answers.speakers(examples, influence, "a")]
    assert captions == ["+0.31 b", "+0.20 a", "+0.00 a"]


def test_a_drawing_takes_the_polarity_that_is_chosen(shades):
    """Dark ink is light ink's negative: with 'ink_light' a drawing is like a negative upload."""
    negative = Picture(Image.eval(sketchpad.draw(CROSS), lambda v: 255 - v), "x", False)
    examples = [negative._replace(label="cross"), grey(0, "nothing")]
    settings = shades._replace(polarity="ink_light")
    answer = last(answers.answer(examples, answers.from_drawing(CROSS), settings))
    same = last(answers.answer(examples, negative, settings))
    assert answer.probabilities == pytest.approx(same.probabilities, abs=1e-6)
    other = last(answers.answer(examples, answers.from_drawing(CROSS), shades))
    assert other.probabilities["cross"] != pytest.approx(same.probabilities["cross"], abs=1e-3)


@pytest.mark.parametrize(
    ("examples", "query", "settings", "message"),
    [
        ([], grey(0), DEFAULT, r"examples of 0 class\(es\): add some of at least 2"),
        ([grey(0, "a")] * 2, grey(0), DEFAULT, r"examples of 1 class\(es\): add some"),
        ([grey(0, "a"), grey(128, "b")], grey(0), DEFAULT, r"^128\.png has a grey border"),
        ([grey(0, "a"), grey(255, "b")], grey(120), DEFAULT, r"^120\.png has a grey border"),
        (
            [grey(0, "a"), grey(255, "b")],
            grey(0),
            Settings("omniglot-maml"),
            "choose normalisation 'support', 'one_at_a_time', or 'batch'",
        ),
        (
            [grey(0, "a"), grey(255, "b")],
            grey(0),
            Settings("omniglot-maml", "support"),
            "another number of classes than the 2 given",
        ),
        ([grey(0, "a"), grey(255, "b")], grey(0), Settings("nowhere"), "config.json in nowhere"),
    ],
)
def test_mistakes_are_one_line(examples, query, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        last(answers.answer(examples, query, settings))
    assert "\n" not in str(caught.value)


def test_weights_are_named_by_a_folder_or_as_they_are_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.named_weights(None, None) is None
    name = weights.named_weights(None, "glyphs-prototypical")
    assert weights.describe_weights(name) == f"weights {name}, which come with meta_jax"
    assert weights.weights_folder(name).is_dir()
    (tmp_path / "glyphs-prototypical").mkdir()  # a folder that was named is meant
    name = weights.named_weights(None, "glyphs-prototypical")
    assert name == "./glyphs-prototypical"
    assert weights.weights_folder(name) == Path(name)
    assert weights.named_weights("runs/1", None) == "runs/1"


# ---- The page's functions.


def test_a_change_answers_the_last_query_again(shades):
    examples = [grey(20, "dark"), grey(230, "light")]
    told, _, probabilities, speakers = last(page.on_change(shades, grey(210), examples))
    assert "210.png is light" in told
    assert probabilities["light"] > 0.5 and len(speakers) == 1
    told, picture, probabilities, speakers = last(page.on_change(shades, None, examples))
    assert (told, picture, probabilities, speakers) == ("<p></p>", None, None, None)


def test_what_the_page_chooses_is_what_is_used():
    examples = [grey(0, "a"), grey(255, "b")]
    told, *_ = last(page.on_change(DEFAULT, grey(0), examples, "omniglot-maml", "as in training"))
    assert "maml was trained with normalisation" in told


def test_mistakes_are_shown_on_the_page_without_losing_anything(tmp_path):
    examples = [grey(0, "a")]
    kept, _, told, drawing = page.on_add(examples, "", CORNER)
    assert kept == examples and "no name" in told and drawing == CORNER
    kept, gallery, told, drawing = page.on_add(examples, "b", CORNER)
    assert len(kept) == len(gallery) == 2 and "2 examples" in told and drawing == ""
    assert page.on_undo(kept)[0] == examples and page.on_undo([])[0] == []
    text = tmp_path / "<b>.png"
    text.write_text("no image")
    kept, _, told, button = page.on_upload(examples, "a", [str(text)])
    assert kept == examples and "&lt;b&gt;.png does not decode" in told and button is None
    query, *_, told, _, _, _ = last(page.on_new_file(DEFAULT, str(text), examples))
    assert query is None and "does not decode" in told
    query, told, *_ = last(page.on_drawing(DEFAULT, "", examples))
    assert query is None and "the drawing is empty" in told
    query, told, *_ = last(page.on_drawing(DEFAULT, CORNER, examples))
    assert query.drawn and "at least 2" in told


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind((page.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} cannot be used .*--port"):
            page.check_port(port)
    page.check_port(port)


def test_every_answer_forbids_other_servers():
    sent = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body"})

    async def send(message):
        sent.append(message)

    asyncio.run(page.OwnServerOnly(application)({}, None, send))
    (first, policy), body = sent[0]["headers"], sent[1]
    assert first == (b"a", b"b") and body == {"type": "http.response.body"}
    assert policy[0] == b"content-security-policy" and b"default-src 'self'" in policy[1]
    assert b"http" not in policy[1] and b"*" not in policy[1]


def test_without_gradio_one_line_names_the_extra():
    code = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['demo']\n"
        "from experiments.command_line import run_main\n"
        "from experiments.demo.__main__ import main\n"
        "run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the demo page needs gradio, which is not installed: pip install 'meta_jax[demo]'"
    ]


def test_the_layout_is_built_where_gradio_is_installed(tmp_path):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: pip install 'meta_jax[demo]'")
    built = page.build(page.import_gradio(str(tmp_path)), [DEFAULT.weights, "b"], DEFAULT)
    assert built.analytics_enabled is False
    assert all(event.api_visibility == "private" for event in built.fns.values())
