"""A folder with pictures, a table, and one HTML page that shows them all and opens without a network."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from dyn_lightning.analysis.html import document, picture, table

# What each picture means, and what to conclude, by the beginning of its name.
MEANING = {
    "routing_report/depth": """From input to output. Entropy near 1: every image gets a nearly even mixture of the
        kernels; near 0: each image has a kernel of its own. Variance between classes:
        how much of the routing an image's class explains; low in layers that look at textures and colours, high where
        kernels specialise on classes. Load: a kernel's share, averaged over the images; dark blue kernels are hardly
        used, and those that are crossed out by no image: the layer has more kernels than it needs.""",
    "routing_report/similarity": """How alike two layers tell images apart by their routing weights, whatever the order
        of their kernels. Bright cells off the diagonal are layers that decide the same; they could share a router.""",
    "routing_report/classes": """A row a class, a column a kernel. Rows that look alike: the layer routes all classes in
        the same way. Rows that differ: kernels specialise on classes.""",
    "expert_examples": """The images that give each kernel the largest share of their routing weights. What a row has in
        common, a class, colour or shape, says what the kernel is for; rows that share their images belong to kernels
        that do the same. Look at the shares: where they are near 1 / K, the choice means little.""",
    "group_counts": """The number of groups of channels that each layer has learned. Many groups are cheap, one group is
        a dense convolution; grey is as many as are possible.""",
    "group_membership": """Which channels of a layer are connected. All black is a dense convolution; blocks or regular
        dots are groups.""",
}


class Page(Logger):
    """A logger that writes PNG files at once, and a CSV and a page of everything at the end.

    Scalars named ``STATISTIC/LAYER`` become rows of ``layers.csv``, one a layer.

    Args:
        folder: where to; it exists.
        title: of the page.
        layers: the names of the layers, in their order.
    """

    def __init__(self, folder: Path, title: str, layers: list[str]) -> None:
        super().__init__()
        self.folder = folder
        self.title = title
        self.layers = layers
        self.scalars: dict[str, float] = {}
        self.pictures: dict[str, Path] = {}

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "page"

    @property
    def version(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Leave them to the configuration file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take scalars."""
        self.scalars |= {name: value for name, value in metrics.items() if name != "epoch"}

    @rank_zero_only
    def log_image(self, key: str, images: list[np.ndarray], step: int | None = None) -> None:
        """Write a picture ``(H, W, 3)``, bytes."""
        path = self.folder / f"{key.replace('/', '-')}.png"
        Image.fromarray(images[0]).save(path, optimize=True)
        self.pictures[key] = path

    @rank_zero_only
    def write(self, facts: dict[str, str]) -> None:
        """Write ``layers.csv`` and ``index.html``, which begins with these facts."""
        columns, rows = self._table()
        with (self.folder / "layers.csv").open("w", newline="", encoding="utf8") as file:
            writer = csv.writer(file)
            writer.writerow(["layer", *columns])
            writer.writerows([layer, *(row.get(column, "") for column in columns)] for layer, row in rows.items())
        shown = [[layer, *(_number(row.get(column)) for column in columns)] for layer, row in rows.items()]
        layers = table(["layer", *(column.replace("_", " ") for column in columns)], shown)
        alone = {name: _number(value) for name, value in self.scalars.items() if not self._layer(name)}
        page = document(
            self.title,
            table([], [[name, value] for name, value in {**facts, **alone}.items()]),
            *(picture(name, path, _meaning(name)) for name, path in self.pictures.items()),
            f"<h2>Layers</h2>\n{layers}",
        )
        (self.folder / "index.html").write_text(page, encoding="utf8")

    def _layer(self, scalar: str) -> str:
        _, _, layer = scalar.partition("/")
        return layer if layer in self.layers else ""

    def _table(self) -> tuple[list[str], dict[str, dict[str, float]]]:
        rows: dict[str, dict[str, float]] = {layer: {} for layer in self.layers}
        for name, value in self.scalars.items():
            if layer := self._layer(name):
                rows[layer][name.partition("/")[0]] = value
        rows = {layer: row for layer, row in rows.items() if row}
        return list(dict.fromkeys(column for row in rows.values() for column in row)), rows


def _meaning(picture: str) -> str:
    return next((text for start, text in MEANING.items() if picture.startswith(start)), "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
