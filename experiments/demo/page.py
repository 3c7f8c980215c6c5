"""The demo page itself: what lies where, and which function of `answers` an event calls.

Nothing leaves the machine: the server listens on the loopback interface; Gradio's telemetry,
version check and sharing are off; fonts are the system's; the page may load from its own server
alone.
"""

import functools
import html
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from experiments.demo import answers
from experiments.demo.answers import Picture, Settings
from experiments.demo.sketchpad import sketchpad
from meta_jax.lookup import UsageError, import_extra
from meta_jax.training.checkpoints import CheckpointError

if TYPE_CHECKING:
    import gradio  # pyrefly: ignore[missing-import]

HOST = "127.0.0.1"
# Read by Gradio when it is imported.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
# Whatever the page's scripts would like to load from elsewhere, the browser refuses.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
_COLUMNS = 4  # of a gallery, however few pictures it holds
_CSS = f"""
.message p {{ margin: 0; min-height: 1.5em; font-weight: 600; }}
.pictures .grid-container {{
  grid-template-columns: repeat({_COLUMNS}, minmax(0, 1fr)) !important;
}}
.pictures .caption-label {{ font-size: 0.75em; padding: 0 0.3em; max-width: 100%; }}
.pictures .grid-container, .pictures .image-container {{ padding-top: 1.7em; }}
"""
# Of events: not for other programs, and without a veil over what is on the page.
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_INTRODUCTION = """
# Few-shot classification
Draw or upload a few examples of each class, then a new one: it is classified at once, without
training. All stays on this machine.
"""


def import_gradio(uploads: str) -> Any:
    """Imports Gradio, its telemetry switched off.

    Args:
      uploads: Folder where it keeps what is uploaded.

    Raises:
      UsageError: it is not installed.
    """
    os.environ.update(_ENVIRONMENT, GRADIO_TEMP_DIR=uploads)
    # Gradio asks its own server whether it runs, which no proxy could tell.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST]))
    return import_extra("gradio", "demo", "the demo page")


def check_port(port: int) -> None:
    """Raises UsageError where another program has the port."""
    with socket.socket() as probe:
        # As servers do it: a port is free although connections of the last server linger.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used ({error.strerror}): choose another by --port"
            ) from error


def serve(choices: Sequence[str], chosen: Settings, port: int) -> None:
    """Serves the page until it is interrupted.

    Args:
      choices: Weights that can be chosen, names and folders.
      chosen: Settings that are chosen at first.
      port: Port on the loopback interface.

    Raises:
      UsageError: Gradio is not installed, or the port is taken.
    """
    check_port(port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What is uploaded is gone when the page is closed, by Ctrl-C or by a signal.
    with tempfile.TemporaryDirectory() as uploads:
        gr = import_gradio(uploads)
        page = build(gr, choices, chosen)
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=_CSS,
            app_kwargs={"middleware": [(OwnServerOnly, (), {})]},
        )
        print(f"the page is at http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


class OwnServerOnly:
    """An ASGI middleware that forbids the page to load anything from another server."""

    def __init__(self, app: Any) -> None:
        """Keeps the application."""
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request with the policy among the headers."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


# ---- The layout.


def build(gr: Any, choices: Sequence[str], chosen: Settings) -> "gradio.Blocks":
    """Builds the page.

    Args:
      gr: The module gradio.
      choices: As in `serve`.
      chosen: As in `serve`.
    """
    with gr.Blocks(title="meta_jax", analytics_enabled=False) as page:
        gr.Markdown(_INTRODUCTION)
        settings = _settings(gr, choices, chosen)
        with gr.Row():
            with gr.Column():
                support = _support(gr)
            with gr.Column():
                query = _query(gr)
        _connect(support, query, settings, chosen)
    return page


def _settings(gr: Any, choices: Sequence[str], chosen: Settings) -> list[Any]:
    """The fields of `Settings` that can be chosen, in its order."""
    with gr.Row():
        return [
            gr.Dropdown(list(choices), value=chosen.weights, label="weights", elem_id="weights"),
            gr.Dropdown(
                list(answers.NORMALISATIONS),
                value=chosen.normalisation,
                label="normalisation",
                elem_id="normalisation",
            ),
            gr.Dropdown(
                list(answers.POLARITIES),
                value=chosen.polarity,
                label="polarity of characters",
                elem_id="polarity",
            ),
        ]


def _support(gr: Any) -> dict[str, Any]:
    """The examples' half of the page."""
    gr.Markdown("### 1. Examples of each class")
    parts = {"examples": gr.State([])}
    with gr.Row():
        with gr.Column(scale=3, min_width=200):
            parts["pad"] = sketchpad(gr, "Draw an example", "example")
            parts["message"] = gr.HTML(elem_id="support_message", elem_classes="message")
        with gr.Column(scale=2, min_width=160):
            parts["label"] = gr.Textbox("A", label="class", elem_id="class", max_lines=1)
            parts["add"] = gr.Button("Add the drawing", variant="primary", size="md", elem_id="add")
            parts["files"] = gr.UploadButton(
                "Upload images", file_count="multiple", size="md", elem_id="examples"
            )
            parts["undo"] = gr.Button("Remove the last", size="sm", elem_id="undo")
            parts["clear"] = gr.Button("Start over", size="sm", elem_id="clear")
    parts["gallery"] = _gallery(gr, "examples", "gallery")
    return parts


def _query(gr: Any) -> dict[str, Any]:
    """The new picture's half of the page."""
    gr.Markdown("### 2. A new one")
    parts = {"query": gr.State(None)}
    with gr.Row():
        with gr.Column(scale=3, min_width=200):
            parts["pad"] = sketchpad(gr, "Draw a new one", "query")
            parts["message"] = gr.HTML(elem_id="query_message", elem_classes="message")
        with gr.Column(scale=2, min_width=160):
            parts["file"] = gr.UploadButton("Upload an image", size="md", elem_id="new")
            parts["shown"] = gr.Image(
                label="the new one",
                height=130,
                interactive=False,
                buttons=[],
                elem_classes="pictures",
            )
            parts["label"] = gr.Label(label="class", num_top_classes=6, elem_id="answer")
    parts["speakers"] = _gallery(gr, "examples that speak for it, and how much", "speakers")
    return parts


def _gallery(gr: Any, label: str, elem_id: str) -> Any:
    return gr.Gallery(
        label=label,
        columns=_COLUMNS,
        height=220,
        object_fit="contain",
        buttons=[],
        elem_id=elem_id,
        elem_classes="pictures",
    )


# ---- What happens.


def _connect(
    support: dict[str, Any], query: dict[str, Any], settings: list[Any], chosen: Settings
) -> None:
    """Calls a function below at every event; each change answers the new picture again."""
    examples, gallery, pad = support["examples"], support["gallery"], support["pad"]
    shown = [query[name] for name in ("message", "shown", "label", "speakers")]
    listed = [examples, gallery, support["message"]]
    asked = [examples, *settings]
    answer = functools.partial(on_change, chosen)
    # The first answer waits for compilation.
    waiting = {**_QUIET, "show_progress": "minimal", "show_progress_on": query["label"]}
    changes = [
        support["add"].click(on_add, [examples, support["label"], pad], [*listed, pad], **_QUIET),
        support["files"].upload(
            on_upload,
            [examples, support["label"], support["files"]],
            [*listed, support["files"]],
            **_QUIET,
        ),
        support["undo"].click(on_undo, [examples], listed, **_QUIET),
        support["clear"].click(on_clear, None, listed, **_QUIET),
    ]
    for event in [*(change.then for change in changes), *(each.change for each in settings)]:
        event(answer, [query["query"], *asked], shown, **waiting)
    query["pad"].input(
        functools.partial(on_drawing, chosen),
        [query["pad"], *asked],
        [query["query"], *shown],
        trigger_mode="always_last",
        **waiting,
    )
    query["file"].upload(
        functools.partial(on_new_file, chosen),
        [query["file"], *asked],
        [query["query"], query["file"], query["pad"], *shown],
        **waiting,
    )


def on_add(examples: list[Picture], label: str, drawing: str) -> tuple[Any, ...]:
    """Adds a drawing; the pad is emptied where that succeeds."""
    try:
        examples = answers.add_drawing(examples, label, drawing)
    except UsageError as error:
        return *_listed(examples, str(error)), drawing
    return *_listed(examples), ""


def on_upload(examples: list[Picture], label: str, paths: list[str]) -> tuple[Any, ...]:
    """Adds files; the button is made ready for more."""
    try:
        examples, mistake = answers.add_files(examples, label, paths)
    except UsageError as error:
        mistake = str(error)
    return *_listed(examples, mistake), None


def on_undo(examples: list[Picture]) -> tuple[Any, ...]:
    """Removes the last example."""
    return _listed(examples[:-1])


def on_clear() -> tuple[Any, ...]:
    """Removes all examples."""
    return _listed([])


def _listed(examples: list[Picture], mistake: str = "") -> tuple[Any, ...]:
    """The examples as state, as a gallery, and a line on them."""
    gallery = [(answers.thumbnail(example), example.label) for example in examples]
    return examples, gallery, line(mistake or answers.summary(examples))


def on_drawing(
    chosen: Settings, drawing: str, examples: list[Picture], *settings: Any
) -> Iterator[tuple[Any, ...]]:
    """Takes a drawing as the new picture, and answers it."""
    try:
        query = answers.from_drawing(drawing)
    except UsageError as error:
        yield None, *_shown(None, str(error))
        return
    for shown in on_change(chosen, query, examples, *settings):
        yield query, *shown


def on_new_file(
    chosen: Settings, path: str, examples: list[Picture], *settings: Any
) -> Iterator[tuple[Any, ...]]:
    """Takes a file as the new picture, and answers it; the pad and the button are made ready."""
    try:
        query = answers.from_file(path)
    except UsageError as error:
        yield None, None, "", *_shown(None, str(error))
        return
    for shown in on_change(chosen, query, examples, *settings):
        yield query, None, "", *shown


def on_change(
    chosen: Settings, query: Picture | None, examples: list[Picture], *settings: Any
) -> Iterator[tuple[Any, ...]]:
    """Answers the new picture, where there is one.

    Args:
      chosen: Settings of the start; those that the page has no field for stay.
      query: The new picture.
      examples: The examples.
      *settings: What the fields of the page say, in the order of `Settings`.
    """
    if query is None:
        yield _shown(None, "")
        return
    settings_now = chosen._replace(**dict(zip(Settings._fields, settings, strict=False)))
    try:
        for found in answers.answer(examples, query, settings_now):
            best = max(found.probabilities, key=found.probabilities.__getitem__)
            told = f"{query.name} is {best} ({100 * found.probabilities[best]:.0f} %)"
            yield _shown(query, told, found)
    except (UsageError, CheckpointError) as error:
        yield _shown(query, str(error))


def _shown(
    query: Picture | None, text: str, found: answers.Answer | None = None
) -> tuple[Any, ...]:
    """A line, the picture, the probabilities and the examples that speak, as the page has them."""
    picture = None if query is None else answers.thumbnail(query)
    if found is None:
        return line(text), picture, None, None
    return line(text), picture, dict(found.probabilities), list(found.speakers)


def line(text: str) -> str:
    """A text as one line of HTML, whatever names and files hold."""
    return f"<p>{html.escape(' '.join(text.split()))}</p>"
