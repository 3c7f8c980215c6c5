import io
import json
import struct
import sys
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.training.writers import MetricsWriter, Progress, as_history, read_metrics


def run(workdir, first, last, resume_step=0):
    with MetricsWriter(workdir, resume_step) as writer:
        for step in range(first, last + 1):
            writer.write(step, "train", {"loss": jnp.float32(1 / step), "accuracy": np.sqrt(step)})
            if step % 2 == 0:
                writer.write(step, "val", {"loss": 0.1 * step})


def scalars(workdir):
    """(tag, value, step) of every scalar in the TensorBoard event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = set()
    for file in (workdir / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:
            # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found |= {(v.tag, v.simple_value, event.step) for v in event.summary.value}
            data = data[16 + length :]
    return found


def test_lines_have_step_first_and_floats_that_round_trip(tmp_path):
    values = {"zeta": np.float32(0.1), "alpha": jnp.float32(1 / 3), "loss": 1e-17}
    with MetricsWriter(tmp_path) as writer:
        writer.write(jnp.int32(5), "val", values)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["step", "alpha", "loss", "split", "zeta"]
    (metrics,) = read_metrics(tmp_path)
    assert metrics.pop("step") == 5
    assert metrics.pop("split") == "val"
    assert metrics == {name: float(value) for name, value in values.items()}


def test_lines_are_on_disk_as_soon_as_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 2})
    assert read_metrics(tmp_path) == [{"step": 1, "split": "train", "loss": 2.0}]
    writer.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 7, "lo'], ids=["whole", "torn"])
@pytest.mark.parametrize("resume_step", [0, 4, 6])
def test_resumed_file_is_bitwise_that_of_an_uninterrupted_run(tmp_path, resume_step, torn):
    run(tmp_path / "whole", 1, 9)
    run(tmp_path / "killed", 1, 6)
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run(tmp_path / "killed", resume_step + 1, 9, resume_step)
    names = [tmp_path / name / "metrics.jsonl" for name in ("whole", "killed")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_torn_last_line_is_not_read(tmp_path):
    run(tmp_path, 1, 1)
    whole = read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert read_metrics(tmp_path) == whole
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "text",
    [
        "{nonsense",
        "\x00",
        "[1]",
        '{"split": "val"}',
        '{"step": 1}',
        '{"step": "1", "split": "val"}',
        '{"step": 1, "split": 2}',
        '{"step": 1, "split": "val", "loss": null}',
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_damaged_line_is_named_and_the_file_left_alone(tmp_path, text, before):
    path, line = tmp_path / "metrics.jsonl", '{"step": 1, "split": "val"}\n'
    path.write_text(before * line + text + "\n" + line)
    content = path.read_bytes()
    for read in (lambda: MetricsWriter(tmp_path, resume_step=3), lambda: read_metrics(tmp_path)):
        with pytest.raises(UsageError, match=rf"metrics.jsonl: line {before + 1} is damaged"):
            read()
    assert path.read_bytes() == content


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for read in (lambda: MetricsWriter(tmp_path), lambda: read_metrics(tmp_path)):
        with pytest.raises(UsageError, match=r"metrics.jsonl is a folder.*remove or rename"):
            read()


def test_metric_may_not_hide_the_step(tmp_path):
    with (
        MetricsWriter(tmp_path) as writer,
        pytest.raises(ValueError, match="may not be called 'step'"),
    ):
        writer.write(1, "train", {"step": 3})


def test_tensorboard_mirrors_metrics_and_alone_holds_timing(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, "val", {"loss": 0.5})
        writer.write_timing(3, {"steps_per_second": 8.0})
    assert scalars(tmp_path) == {("val/loss", 0.5, 3), ("timing/steps_per_second", 8.0, 3)}
    assert read_metrics(tmp_path) == [{"step": 3, "split": "val", "loss": 0.5}]


def test_works_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": 1})
        writer.write_timing(1, {"seconds": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_given_to_a_function_once_they_are_on_disk(tmp_path):
    seen = []

    def on_metrics(step, split, metrics):
        seen.append((step, split, metrics, len(read_metrics(tmp_path))))

    with MetricsWriter(tmp_path, on_metrics=on_metrics) as writer:
        writer.write(3, "train", {"loss": jnp.float32(0.5)})
        writer.write_timing(3, {"seconds": 1})
        writer.write(4, "val", {"accuracy": 1})
    assert seen == [(3, "train", {"loss": 0.5}, 1), (4, "val", {"accuracy": 1.0}, 2)]
    assert all(type(value) is float for _, _, metrics, _ in seen for value in metrics.values())


def test_the_history_is_arrays_by_split(tmp_path):
    run(tmp_path, 1, 3)
    history = as_history(read_metrics(tmp_path))
    assert set(history) == {"train", "val"}
    assert history["train"]["step"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(history["train"]["accuracy"], np.sqrt([1, 2, 3]))
    assert history["val"]["step"].tolist() == [2]
    assert as_history([]) == {}


def test_a_metric_that_a_line_lacks_is_nan_in_the_history():
    lines = [{"step": 1, "split": "val", "loss": 1.0}, {"step": 2, "split": "val", "mse": 3.0}]
    history = as_history(lines)["val"]
    np.testing.assert_array_equal(history["loss"], [1.0, np.nan])
    np.testing.assert_array_equal(history["mse"], [np.nan, 3.0])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show_progress():
    shown = ("loss", "accuracy", "absent")
    with Progress(total_steps=10, initial=4, tasks_per_step=16, shown=shown) as progress:
        for step in range(6):
            progress.update(1, {"loss": jnp.float32(0.5), "accuracy": 0.25, "other": step})


def test_progress_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    show_progress()
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert "10/10" in last
    assert "step/s" in last
    assert "loss=0.5" in last
    assert "accuracy=0.25" in last
    assert "other" not in last


def test_progress_in_a_notebook_is_a_widget(monkeypatch):
    bar = mock.Mock(**{"return_value.format_dict": {"rate": 2.0}})
    shell = SimpleNamespace(kernel=object())
    for name, module in {
        "IPython": SimpleNamespace(get_ipython=lambda: shell),
        "ipywidgets": SimpleNamespace(),
        "tqdm.notebook": SimpleNamespace(tqdm=bar),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    show_progress()
    assert bar.call_args.kwargs["initial"] == 4
    assert bar.return_value.update.mock_calls == 6 * [mock.call(1)]
    shown = {"tasks/s": "32", "loss": "0.5", "accuracy": "0.25"}
    bar.return_value.set_postfix.assert_called_with(shown, refresh=False)
    bar.return_value.close.assert_called_once_with()


@pytest.mark.parametrize("ipython", [None, SimpleNamespace(get_ipython=lambda: None)])
def test_a_short_run_elsewhere_is_silent(capfd, monkeypatch, ipython):
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    show_progress()
    assert capfd.readouterr() == ("", "")


def test_elsewhere_a_line_every_half_minute(capfd):
    now = [100.0]
    progress = Progress(1000, 200, 16, ("loss", "absent"), clock=lambda: now[0])
    for _ in range(8):
        now[0] += 10.0
        progress.update(50, {"loss": jnp.float32(0.5), "other": 1.0})
    progress.close()
    # 5 steps in a second, of 16 tasks; the first 50 steps tell no speed.
    assert capfd.readouterr() == (
        "",
        "step 400 of 1000, loss 0.5, 80 tasks/s, 2 min 0 s left\n"
        "step 550 of 1000, loss 0.5, 80 tasks/s, 1 min 30 s left\n",
    )


def test_compilation_tells_no_speed(capfd):
    now = [100.0]
    progress = Progress(600, 0, 4, clock=lambda: now[0])
    for seconds, steps in ((90.0, 1), (40.0, 80)):
        now[0] += seconds
        progress.update(steps, {"loss": 0.5})
    progress.close()
    assert capfd.readouterr() == (
        "",
        "step 1 of 600, loss 0.5\nstep 81 of 600, loss 0.5, 8 tasks/s, 4 min 20 s left\n",
    )
