"""The page of experiments.demo in a real browser: drawings, uploads and mistakes.

It needs Gradio, Playwright and a Chromium; where one is missing, the test says which.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
# Characters as strokes of points, in shares of the canvas.
CHARACTERS = {
    "corner": [[(0.2, 0.15), (0.2, 0.85), (0.8, 0.85)]],
    "cross": [[(0.15, 0.5), (0.85, 0.5)], [(0.5, 0.15), (0.5, 0.85)]],
    "square": [[(0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8), (0.2, 0.2)]],
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page's address; the demo runs in a process of its own, and leaves no file behind."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install gradio playwright")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.demo", f"--port={port}"]
    files = tmp_path_factory.mktemp("files")
    # A proxy for the world outside, as many networks have one, does not matter.
    environment = {**os.environ, "TMPDIR": str(files), "http_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            told = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in told
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.communicate()
    assert not list(files.iterdir())


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=OPTIONS.split())
        yield opened
        opened.close()


@pytest.fixture
def requests():
    """What the page asks for."""
    return []


@pytest.fixture
def page(browser, address, requests):
    opened = browser.new_page(viewport={"width": 1200, "height": 1100})
    opened.on("request", lambda request: requests.append(request))
    opened.goto(address)
    opened.wait_for_selector("#query svg.pad")
    yield opened
    opened.close()


def draw(page, pad, strokes, scale=1.0, shift=0.0):
    """Draws with the mouse."""
    box = page.locator(f"{pad} svg.pad").bounding_box()
    for stroke in strokes:
        points = [
            (
                box["x"] + box["width"] * (x * scale + shift),
                box["y"] + box["height"] * (y * scale + shift),
            )
            for x, y in stroke
        ]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=4)
        page.mouse.up()


def wait_for(page, part, text):
    page.locator(part).filter(has_text=re.compile(text)).wait_for()


def add_drawing(page, label, strokes, count):
    page.fill("#class input, #class textarea", label)
    draw(page, "#example", strokes)
    page.click("#add")
    wait_for(page, "#support_message", rf"\b{count} example")


def upload(page, button, paths):
    with page.expect_file_chooser() as chooser:
        page.click(button)
    chooser.value.set_files(paths)


def test_drawn_characters_are_classified(page, requests, address):
    for count, (label, strokes) in enumerate(CHARACTERS.items(), 1):
        add_drawing(page, label, strokes, count)
        assert page.locator("#example path").get_attribute("d") == ""
    assert page.locator("#gallery img").count() == 3

    for label, strokes in CHARACTERS.items():
        draw(page, "#query", strokes, scale=0.6, shift=0.3)
        wait_for(page, "#query_message", rf"the drawing is {label} \(\d+ %\)")
        wait_for(page, "#answer", rf"{label}.*%.*%.*%")
        wait_for(page, "#speakers", rf"\+\d.\d\d {label}")
        page.click("#query [data-pad=clear]")
        wait_for(page, "#query_message", "the drawing is empty")

    ours = (address, "data:", "blob:")
    outside = {each.url: each.failure for each in requests if not each.url.startswith(ours)}
    assert requests and set(outside.values()) <= {"csp"}  # refused by the browser


def test_the_browser_refuses_other_servers(page):
    refused = """new Promise((done) => {
      document.addEventListener('securitypolicyviolation', (event) => done(event.blockedURI));
      fetch('http://elsewhere.invalid/x').catch(() => null);
    })"""
    assert page.evaluate(refused) == "http://elsewhere.invalid/x"


def test_uploads_are_classified_and_mistakes_are_one_line(page, tmp_path):
    def photo(name, shade):
        pixels = np.random.default_rng(shade).integers(shade, shade + 25, (60, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    text = tmp_path / "x.png"
    text.write_text("no image")
    page.fill("#class input, #class textarea", "dark")
    upload(page, "#examples", [photo("a.jpg", 0), photo("b.png", 10)])
    wait_for(page, "#support_message", r"2 examples of 1 classes: dark \(2\)")
    upload(page, "#new", [photo("c.png", 5)])
    wait_for(page, "#query_message", "add some of at least 2")
    page.fill("#class input, #class textarea", "bright")
    upload(page, "#examples", [photo("d.webp", 225), text])
    wait_for(page, "#support_message", "x.png does not decode as an image")
    wait_for(page, "#query_message", "c.png is ")
    upload(page, "#new", [text])
    wait_for(page, "#query_message", "x.png does not decode as an image")
    assert "Traceback" not in page.locator("body").inner_text()
