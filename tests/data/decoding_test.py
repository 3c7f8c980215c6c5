import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meta_jax.data import decoding
from meta_jax.data.dataset import DataError
from meta_jax.data.decoding import Encoded, decode_images


def _image(value, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (3, 3), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def two_processes(monkeypatch):
    """So few images are decoded by two processes, and which reader was asked is noted."""
    monkeypatch.setattr(decoding, "_FEW", 3)
    monkeypatch.setattr(decoding, "_CHUNK", 4)
    monkeypatch.setattr(decoding, "_cores", lambda: 2)
    asked = []
    ask = decoding._Process.ask
    monkeypatch.setattr(
        decoding._Process, "ask", lambda self, *args: asked.append(self) or ask(self, *args)
    )
    return asked


def test_processes_find_what_one_finds_from_bytes_and_from_files(two_processes, tmp_path):
    images = [Encoded(_image(i), f"{i}") for i in range(10)]
    for i in range(10, 19):
        (tmp_path / f"ä {i}.png").write_bytes(_image(i))
        images.append(Encoded(str(tmp_path / f"ä {i}.png"), f"{i}"))
    decoded = decode_images(images, 5, 3)
    assert len(two_processes) == 5
    assert decoded.pixels.shape == (19, 5, 5, 3)
    np.testing.assert_array_equal(decoded.pixels[:, 2, 2], np.arange(19)[:, None].repeat(3, 1))
    assert not decoded.colour
    assert decoded.broken == []


@pytest.mark.parametrize("few", [3, 100])
def test_broken_images_and_colours_are_told(two_processes, monkeypatch, few):
    monkeypatch.setattr(decoding, "_FEW", few)
    sources = [_image(7)] * 6 + [b"broken", _image((200, 0, 0), "RGB"), "/nowhere/x.png"]
    decoded = decode_images([Encoded(source, "x") for source in sources], 2, 1)
    assert bool(two_processes) == (few == 3)
    assert [index for index, _ in decoded.broken] == [6, 8]
    assert "No such file" in decoded.broken[1][1]
    assert decoded.colour
    assert decoded.pixels[:, 0, 0, 0].tolist() == [7] * 6 + [0, 60, 0]


def test_images_are_decoded_here_where_no_process_can_start(two_processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    decoded = decode_images([Encoded(_image(i), "x") for i in range(9)], 2, 1)
    assert decoded.pixels[:, 0, 0, 0].tolist() == list(range(9))
    assert not two_processes


def test_a_bar_shows_on_a_terminal_where_there_is_enough_to_wait_for(two_processes, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    decode_images([Encoded(_image(i), "x") for i in range(3)], 2, 1)
    assert shown.getvalue() == ""
    decode_images([Encoded(_image(i), "x") for i in range(9)], 2, 1)
    assert "decoding:   0%" in shown.getvalue()
    assert "0/9" in shown.getvalue()


def test_a_process_that_is_ended_is_an_error_in_one_line(two_processes, monkeypatch):
    start = decoding._Process.__init__

    def start_and_kill(self):
        start(self)
        self._process.kill()

    monkeypatch.setattr(decoding._Process, "__init__", start_and_kill)
    with pytest.raises(DataError, match=r"decodes images ended \(exit status -9\): free"):
        decode_images([Encoded(_image(i), "x") for i in range(9)], 2, 1)


def test_a_script_needs_no_guard_and_processes_import_no_jax(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(_image(i))
    script = tmp_path / "script.py"
    script.write_text(f"""
import glob, sys
from meta_jax.data import decoding
decoding._FEW, decoding._CHUNK, decoding._cores = 3, 4, lambda: 2
print("script runs")
files = sorted(glob.glob({str(tmp_path)!r} + "/*.png"))
decoded = decoding.decode_images([decoding.Encoded(f, f) for f in files], 2, 1)
print(decoded.pixels.shape)
""")
    root = Path(decoding.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["script runs", "(12, 2, 2, 1)"], done.stderr
    loaded = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", decoding.pixels.__file__],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    ).stderr
    assert "numpy" in loaded
    assert "jax._src" not in loaded
