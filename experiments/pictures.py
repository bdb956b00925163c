"""Make the pictures of what layers learned in the README: ``python -m experiments.pictures``.

Two trainings on the built-in digits, and an analysis of the 360 test images by each one's last checkpoint: a ResNet-14
whose convolutions are CondConv with 4 experts, 20 epochs; and the same with DGConv within a budget of a quarter of all
pairs of channels. Then TensorBoard's pages of the first, in a browser (Debian's chromium and chromium-driver). Three
minutes on two cores.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMON = ["--trainer.max_epochs", "20", "--trainer.callbacks", "[]", "--trainer.enable_progress_bar", "false"]
RUNS = {
    "condconv": ["--model.conv", "condconv", "--model.conv_args", '{"num_experts": 4}'],
    "dgconv": ["--model.conv", "dgconv", "--model.conv_args", "{}", "--model.group_budget", "4"],
}
KEPT = {
    "condconv": {
        "routing_report-depth": "depth",
        "routing_report-classes": "classes",
        "routing_report-similarity": "similarity",
        "expert_examples-backbone.layer3.1.conv2": "examples",
    },
    "dgconv": {"group_counts": "groups", "group_membership-backbone.layer2.1.conv2": "membership"},
}
PORT = 6043
PAGES = [
    ("custom_scalars", "_smoothingWeight=0", 1150),
    ("histograms", "tagFilter=layer3.1.conv2", 1000),
]


def call(folder: Path, module: str, *arguments: str) -> None:
    """Run a command of the package in a folder."""
    subprocess.run([sys.executable, "-m", f"dyn_lightning.{module}", *arguments], cwd=folder, check=True)


def photograph(folder: Path) -> None:
    """Keep pictures of TensorBoard's pages."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs/condconv", "--port", str(PORT)]
    board = subprocess.Popen(command, cwd=folder)
    chrome = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        chrome.add_argument(flag)
    try:
        with webdriver.Chrome(chrome, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
            time.sleep(15)  # for TensorBoard to read the run
            for page, options, height in PAGES:
                browser.set_window_size(1400, height)
                browser.get("about:blank")
                browser.get(f"http://localhost:{PORT}/#{page}&{options}")
                time.sleep(8)
                browser.save_screenshot(str(DOCS / f"{page}.png"))
    finally:
        board.terminate()


def main() -> None:
    """Train, analyse, and copy the pictures to ``docs``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quickstart = str(ROOT / "experiments" / "quickstart.yaml")
        for run, options in RUNS.items():
            call(folder, "fit", "--config", quickstart, "--name", run, *options, *COMMON)
            config = str(folder / "runs" / run / "version_0" / "config.yaml")
            call(folder, "analyze", "--config", config, "--ckpt_path", "last", "--split", "test", "--output", run)
            for picture, kept in KEPT[run].items():
                shutil.copy(folder / run / f"{picture}.png", DOCS / f"{kept}.png")
        photograph(folder)


if __name__ == "__main__":
    main()
