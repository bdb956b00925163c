"""What users see: TensorBoard and the page of ``analyze``, in a real browser."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from dyn_lightning.analyze import main
from tests.command_line import in_this_process

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size=1500,1300 --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync --disable-quic"
)
# TensorBoard's pages are trees of shadow roots, which `innerText` does not look into.
TEXT = """
const words = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) { words.push(node.textContent); return; }
  if (node.nodeType === Node.ELEMENT_NODE && node.matches('script, style, template')) return;
  if (node.contentDocument) walk(node.contentDocument.body);  // the projector is in a frame of a frame
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return words.join('\\n').replace(/\\s+/g, ' ');
"""
PICTURES = """
const found = [];
const walk = (node) => {
  if (node instanceof HTMLImageElement && node.src.includes('/images/individualImage')) found.push(node.naturalWidth);
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return found;
"""

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(observed_run: Path) -> Iterator[str]:
    """Where TensorBoard shows the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(observed_run), "--port", str(port)]
    address = f"http://localhost:{port}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                    if answer.read() != b"[]\n":
                        break
            except OSError:
                pass
            time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def shows(browser: webdriver.Chrome, url: str, wanted: list[str], seconds: float = 40) -> None:
    """Open a page, and wait until it shows all of this."""
    browser.get("about:blank")
    browser.get(url)
    missing, end = wanted, time.monotonic() + seconds
    while missing and time.monotonic() < end:
        time.sleep(0.3)
        text = browser.execute_script(TEXT)
        missing = [words for words in wanted if words not in text]
    assert missing == [], f"{url} shows {text[:3000]}"


class TestTensorBoard:
    @pytest.mark.parametrize(
        ("page", "wanted"),
        [
            ("scalars&tagFilter=balance", ["routing_balance/backbone.conv2", "routing_balance/backbone.conv4"]),
            (
                "custom_scalars",
                [
                    "loss and temperature",
                    "entropy / log2 K of all layers",
                    "variance between classes",
                    "groups of all layers",
                    "Matches (2)",
                ],
            ),
            ("histograms", [f"routing/backbone.conv2/{kernel}" for kernel in range(3)]),
            ("distributions", [f"routing/backbone.conv2/{kernel}" for kernel in range(3)]),
            (
                "images&tagFilter=.",
                [
                    "expert_examples/backbone.conv2",
                    "expert_examples/backbone.conv4",
                    "group_counts",
                    "group_membership/backbone.conv3",
                    "routing_report/classes",
                    "routing_report/depth",
                    "routing_report/similarity",
                ],
            ),
            ("projector", ["Points: 180", "Dimension: 6"]),
        ],
        ids=lambda value: value.partition("&")[0] if isinstance(value, str) else "",
    )
    def test_pages(self, page: str, wanted: list[str], browser: webdriver.Chrome, address: str) -> None:
        shows(browser, f"{address}/#{page}", wanted)

    def test_pictures_are_loaded(self, browser: webdriver.Chrome, address: str) -> None:
        shows(browser, f"{address}/#images&tagFilter=.", ["routing_report/depth"])
        end = time.monotonic() + 40
        while len(widths := browser.execute_script(PICTURES)) < 7 or 0 in widths:
            assert time.monotonic() < end, widths
            time.sleep(0.3)
        assert min(widths) > 200


def test_the_page_of_an_analysis(
    observed_run: Path, browser: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened from the disk, with all its pictures, and no wider than the window."""
    in_this_process(tmp_path, monkeypatch)
    main(["--config", str(observed_run / "config.yaml"), "--output", "page"])
    browser.set_network_conditions(offline=True, latency=0, throughput=0)
    try:
        shows(browser, f"file://{tmp_path}/page/index.html", ["What the layers of both learned", "backbone.conv3"])
        widths = browser.execute_script("return [...document.images].map((image) => image.naturalWidth)")
        assert len(widths) == 7
        assert min(widths) > 200
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.delete_network_conditions()
