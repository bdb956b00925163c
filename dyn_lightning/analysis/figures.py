"""Figures of what the layers learned, drawn without a window; each says where it leaves something out."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dyn_lightning.analysis.statistics import LayerStatistics

# What stays readable: of more layers only some are named, more classes and kernels than these are left out.
NAMED_LAYERS, CLASSES, KERNELS, PANELS = 40, 30, 64, 6
PREFIX = 28  # letters of the modules that all layers are in
ROWS_OF_EXAMPLES = 16
SIDE_OF_MEMBERSHIP = 512
SIDE, DPI = 400, 100  # pixels that a smaller membership is drawn with, at most

Layers = Mapping[str, LayerStatistics]


def depth(layers: Layers) -> Figure:
    """Draw against depth the entropy ("flat low, sparse high"), the difference between classes, and each kernel's load.

    The load is a kernel's mean share of the routing weights; dead kernels are crossed out.
    """
    curves = {
        "entropy / log2 K\n1: all kernels equal\n0: one has all": [each.relative_entropy for each in layers.values()],
        "between classes /\nall variance": [each.explained for each in layers.values()],
    }
    shown = min(KERNELS, max(len(each.load) for each in layers.values()))
    heights, gap = (1.6, 1.6, 1 + 0.1 * shown), 0.15
    _, short, _ = _named(list(layers))
    size = (1.8 + min(8.0, 0.25 * len(layers)), sum(heights) + 2 * gap)
    figure = _framed(size, left=1.1, right=1.1, bottom=0.5 + _length(short), top=0.4)
    *panels, last = figure.subplots(3, 1, height_ratios=heights, gridspec_kw={"hspace": 3 * gap / sum(heights)})
    for axes, (title, values) in zip(panels, curves.items(), strict=True):
        axes.plot(values, marker="o", markersize=4)
        axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(-0.05, 1.05), xticks=[], yticks=(0, 0.5, 1), ylabel=title)
        axes.grid(alpha=0.3)
        axes.vlines(range(len(layers)), *axes.get_ylim(), color="lightgrey", linewidth=0.5, zorder=0)
        if all(map(math.isnan, values)):
            axes.text(0.5, 0.5, "nothing to measure", ha="center", transform=axes.transAxes)
    panels[0].set_title("Routing against depth", y=1)
    _draw_load(last, list(layers.values()), shown)
    _name_layers(last, list(layers))
    return figure


def _draw_load(axes: Axes, layers: list[LayerStatistics], shown: int) -> None:
    most = max(len(each.load) for each in layers)
    table = torch.full((shown, len(layers)), math.nan)
    for column, each in enumerate(layers):
        table[: len(each.load), column] = (each.load * len(each.load))[:shown].float()
        crosses = [kernel for kernel in each.dead if kernel < shown]
        axes.plot([column] * len(crosses), crosses, "x", color="black")
    highest = max(2.0, table.nan_to_num().max().item())
    image = _heat_map(axes, table, 2 - highest, highest, "RdBu_r")  # white is an equal share
    _bar(axes, image, "share x K\n1: equal, x: dead").set_ylim(0)
    axes.set_ylabel(f"kernel, {shown} of {most}" if shown < most else "kernel")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def classes(layers: Layers, class_names: Sequence[str] = ()) -> Figure:
    """Draw the mean routing weight of each class and kernel, as CondConv's authors do, of layers from all depths."""
    names = spread(list(layers), PANELS)
    means = [layers[name].class_means for name in names]
    total = len(means[0])
    differs = torch.stack([(mean - mean.nanmean(0)).square().sum(1).nan_to_num() for mean in means]).sum(0)
    kept = differs.argsort(descending=True)[:CLASSES].sort().values
    shown = [mean[kept, :KERNELS].float().numpy() for mean in means]
    labels = [_class_name(class_names, index, 24) for index in kept.tolist()]
    figure = _framed(
        (1 + 1.5 * len(names), 1 + 0.2 * len(kept)), left=0.5 + _length(labels), right=0.9, bottom=0.7, top=0.5
    )
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")  # classes without images
    # Each layer has the same width, whatever its number of kernels.
    edges = [place + np.linspace(0, 1, mean.shape[1] + 1)[:-1] for place, mean in enumerate(shown)]
    columns, rows = np.concatenate([*edges, [len(names)]]), np.arange(len(kept) + 1) - 0.5
    table = np.concatenate(shown, axis=1)
    low, high = min(0.0, np.nan_to_num(table).min()), np.nan_to_num(table).max()
    image = axes.pcolormesh(columns, rows, np.ma.masked_invalid(table), vmin=low, vmax=high)
    _bar(axes, image, "mean routing weight")
    for place in range(1, len(names)):
        axes.axvline(place, color="white", linewidth=3)
    prefix, short = _shortened(list(layers))
    short = spread(short, PANELS)
    titles = [
        name if layers[full].load.numel() <= KERNELS else f"{name}\n{KERNELS} of {layers[full].load.numel()} kernels"
        for full, name in zip(names, short, strict=True)
    ]
    axes.set_xticks([place + 0.5 for place in range(len(names))], titles, fontsize=8)
    axes.set_xlabel(f"layer{f' of {_ending(prefix, PREFIX)}' if prefix else ''}, and in each its kernels", fontsize=9)
    axes.set_yticks(range(len(kept)), labels, fontsize=8)
    axes.set(ylabel="class", ylim=(len(kept) - 0.5, -0.5))
    axes.tick_params(length=0)
    some = f" in {len(names)} of {len(layers)} layers" if len(names) < len(layers) else ""
    some += f"\nthe {len(kept)} of {total} classes that differ most" if len(kept) < total else ""
    axes.set_title(f"Mean routing weights by class{some}", fontsize=11, y=1)
    return figure


def similarity(matrix: Tensor, names: Sequence[str]) -> Figure:
    """Draw how alike the layers route images (``statistics.similarity``)."""
    every, short, label = _named(names)
    side = 2.5 + min(5.5, 0.2 * len(names))
    figure = _framed((side, side), left=0.6 + _length(short), right=0.9, bottom=0.4, top=0.4)
    axes = figure.subplots()
    _bar(axes, _heat_map(axes, matrix, 0, 1), "linear CKA")
    axes.set_title("How alike the layers route images", y=1)
    axes.set_yticks(range(0, len(names), every), short, fontsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.set(xticks=[], xlabel="the same layers")
    return figure


def examples(title: str, images: Tensor, shares: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> Figure:
    """Draw, a row a kernel, the images that give it the largest share of their routing weights.

    Args:
        title: above the figure.
        images: ``(K, k, 3, side, side)``, bytes.
        shares: ``(K, k)``, the kernel's share of each image's routing weights; NaN where there is no image.
        labels: ``(K, k)``, -1 where it is not known.
        class_names: names of the classes, or empty.
    """
    kernels, count, _, side, _ = images.shape
    shown = min(ROWS_OF_EXAMPLES, kernels)
    cell = side + math.ceil(0.4 * (side + 2))  # below each image there are two lines of text
    canvas = np.full((shown * cell, count * (side + 2), 3), 255, dtype=np.uint8)
    inches = (0.75 * count, 0.75 * shown * cell / (side + 2))
    some = f"\n{shown} of {kernels} kernels" if shown < kernels else ""
    size = (max(4.0, inches[0] + 0.7), inches[1] + (0.7 if some else 0.5))
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.6 / size[0], 0.05 / size[1], inches[0] / size[0], inches[1] / size[1]))
    for row in range(shown):
        for column in range(count):
            top, left = row * cell, column * (side + 2)
            if shares[row, column].isnan():
                continue
            canvas[top : top + side, left : left + side] = images[row, column].permute(1, 2, 0).numpy()
            label = int(labels[row, column])
            name = "" if label < 0 else _class_name(class_names, label, 10)
            axes.text(
                left + side / 2,
                top + side,
                f"{name}\n{shares[row, column]:.2f}".strip(),
                ha="center",
                va="top",
                fontsize=7,
            )
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_yticks([row * cell + side / 2 for row in range(shown)], [str(row) for row in range(shown)], fontsize=8)
    axes.set(xticks=[], ylabel="kernel")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    text = f"{_ending(title, 32)}{some}\nclass and the kernel's share of the weights"
    figure.text(0.1 / size[0], 1 - 0.05 / size[1], text, ha="left", va="top", fontsize=9)
    return figure


def group_counts(
    history: Mapping[str, Sequence[int]], epochs: Sequence[int], most: Mapping[str, int], title: str = ""
) -> Figure:
    """Draw the number of groups of each layer over the epochs, and at the end against depth (as DGConv's paper does).

    Args:
        history: numbers of groups by layer, after each of the epochs.
        epochs: how many were over, ascending; of a single one only the end is drawn.
        most: how many groups each layer can have.
        title: above the figure.
    """
    table = torch.tensor([list(counts) for counts in history.values()])
    figure = Figure(figsize=(4.5 if len(epochs) == 1 else 9, _height(len(history))), layout="constrained")
    figure.suptitle(title, fontsize=10)
    *over_time, at_end = figure.subplots(1, min(2, len(epochs)), sharey=True, squeeze=False)[0]
    for axes in over_time:
        highest = max(1, math.ceil(math.log2(max(1, int(table.max())))))
        edges = [epochs[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(epochs)), epochs[-1] + 0.5]
        levels = BoundaryNorm([2 ** (power - 0.5) for power in range(highest + 2)], 256)
        shown = axes.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table.numpy(), norm=levels)
        bar = figure.colorbar(shown, ax=axes, label="groups")
        bar.set_ticks([2**power for power in range(highest + 1)], labels=[str(2**p) for p in range(highest + 1)])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(xlabel="epoch", title="Groups over training")
    rows = range(len(table))
    at_end.barh(rows, [most[name] for name in history], color="lightgrey", label="as many as are possible")
    at_end.barh(rows, table[:, -1].tolist(), label="groups")
    at_end.set_xscale("log", base=2)
    at_end.set_xlim(left=0.7)
    at_end.set_ylim(len(table) - 0.5, -0.5)
    at_end.set(xlabel="groups", title=f"Groups after epoch {epochs[-1]}" if over_time else "Groups")
    figure.legend(*at_end.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    every, short, label = _named(list(history))
    first = over_time[0] if over_time else at_end
    first.set_yticks(rows[::every], short, fontsize=8)
    first.set_ylabel(label, fontsize=9)
    return figure


def membership(name: str, matrix: Tensor) -> Figure:
    """Draw which channels of a layer are connected: black is connected.

    Args:
        name: of the layer.
        matrix: binary ``(C_out, C_in)``; larger ones are averaged, so that grey is partly connected.
    """
    outputs, inputs = matrix.shape
    steps = [math.ceil(length / SIDE_OF_MEMBERSHIP) for length in matrix.shape]
    small = F.avg_pool2d(matrix.detach().float()[None], steps, ceil_mode=True)[0]
    # A whole number of pixels a channel: else some would be wider than others, or not there at all.
    longest = max(small.shape)
    unequal = longest > 4 * min(small.shape)  # with square channels one side could not be seen
    height, width = (each * max(1, SIDE // (each if unequal else longest)) / DPI for each in small.shape)
    figure = _framed((width, height), left=0.7, right=max(0.3, 3.5 - width), bottom=0.5, top=0.5)
    axes = figure.subplots()
    extent = (-0.5, inputs - 0.5, outputs - 0.5, -0.5)
    axes.imshow(small.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=extent, aspect="auto")
    axes.set(xlabel="channel of the input", ylabel="channel of the output")
    some = f", averaged over {steps[0]}x{steps[1]} channels" if max(steps) > 1 else ""
    axes.set_title(f"{_ending(name, 32)}\nblack is connected{some}", fontsize=9, y=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=6))
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """Draw a figure: ``(H, W, 3)``, bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def spread(items: list[Any], count: int) -> list[Any]:
    """Take the first, the last, and some in between at equal distances.

    Example:
        >>> spread(list("abcdefg"), 3)
        ['a', 'd', 'g']
    """
    assert count > 1
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _framed(size: tuple[float, float], left: float, right: float, bottom: float, top: float) -> Figure:
    """Make a figure for axes of a size in inches, with margins for what stands around them.

    matplotlib can find the margins by itself; it measures all text twice for that, which takes a third of the drawing.
    For the same reason the titles of such axes are told where to stand, ``y=1``.
    """
    width, height = left + size[0] + right, bottom + size[1] + top
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    return figure


def _length(labels: Sequence[str]) -> float:
    """Give the inches that the longest of some labels may take at 8 points."""
    return 0.2 + 0.065 * max(map(len, labels))


def _bar(axes: Axes, image: ScalarMappable, label: str) -> Axes:
    """Draw the scale of an image's colours into the margin on the right."""
    figure: Any = axes.figure
    place, inch = axes.get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((place.x1 + 0.12 * inch, place.y0, 0.16 * inch, place.height))
    figure.colorbar(image, cax=bar, label=label)
    return bar


def _heat_map(axes: Axes, table: Tensor, low: float, high: float, colours: str = "viridis") -> AxesImage:
    axes.set_facecolor("lightgrey")  # where there is nothing
    shown = table.float().numpy()
    return axes.imshow(shown, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    every, short, label = _named(names)
    axes.set_xticks(range(0, len(names), every), short, rotation=90, fontsize=8)
    axes.set_xlabel(label, fontsize=9)


def _named(names: Sequence[str]) -> tuple[int, list[str], str]:
    """Say how many layers there are for each that is named, the short names of these, and what all are."""
    every = math.ceil(len(names) / NAMED_LAYERS)
    prefix, short = _shortened(names)
    where, some = f" of {_ending(prefix, PREFIX)}" if prefix else "", f", one of {every} is named" if every > 1 else ""
    return every, short[::every], f"layer{where}\nfrom input to output{some}"


def _shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Take off the modules that all names have in common, and the beginnings of long ones; number them if need be."""
    paths = [name.split(".") for name in names]
    common = 0
    while len(paths) > 1 and all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    short = [_ending(".".join(path[common:])) for path in paths]
    if len(set(short)) < len(short):
        short = [f"{number} {name}" for number, name in enumerate(short)]
    return ".".join(paths[0][:common]), short


def _class_name(names: Sequence[str], label: int, length: int) -> str:
    name = names[label] if label < len(names) else str(label)
    return _plain(name if len(name) <= length else f"{name[: length - 3]}...")


def _ending(name: str, length: int = 20) -> str:
    return _plain(name if len(name) <= length else f"...{name[3 - length :]}")


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which would begin a formula


def _height(layers: int) -> float:
    return 3.5 + min(7.0, 0.2 * layers)
