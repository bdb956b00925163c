"""Figures of what the layers learned, drawn without a window; each says where it leaves something out."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dyn_lightning.analysis.statistics import LayerStatistics

# What stays readable: of more layers only some are named, more classes and kernels than these are left out.
NAMED_LAYERS, CLASSES, KERNELS, PANELS = 40, 30, 64, 6
ROWS_OF_EXAMPLES = 16
SIDE_OF_MEMBERSHIP = 512

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
    heights = (1.6, 1.6, 1 + 0.1 * shown)
    size = (_width(len(layers)), 1.7 + sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    *panels, last = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    for axes, (title, values) in zip(panels, curves.items(), strict=True):
        axes.plot(values, marker="o", markersize=4)
        axes.set(ylim=(-0.05, 1.05), ylabel=title)
        axes.grid(alpha=0.3)
        if all(map(math.isnan, values)):
            axes.text(0.5, 0.5, "not known: there are no labels", ha="center", transform=axes.transAxes)
    panels[0].set_title("Routing against depth")
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
    axes.figure.colorbar(image, ax=axes, label="share x K\n1: equal, x: dead").ax.set_ylim(0)
    axes.set_ylabel(f"kernel, {shown} of {most}" if shown < most else "kernel")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def classes(layers: Layers, class_names: Sequence[str] = ()) -> Figure:
    """Draw the mean routing weight of each class and kernel, as CondConv's authors do, of layers from all depths."""
    names = spread(list(layers), PANELS)
    means = [layers[name].class_means for name in names]
    total = len(means[0])
    differs = torch.stack([(mean - mean.nanmean(0)).square().sum(1).nan_to_num() for mean in means]).sum(0)
    kept = differs.argsort(descending=True)[:CLASSES].sort().values
    kernels = [min(KERNELS, mean.shape[1]) for mean in means]
    table = torch.cat([mean[kept, :count] for mean, count in zip(means, kernels, strict=True)], dim=1)
    figure = Figure(figsize=(2.2 + 1.5 * len(names), 2.4 + 0.2 * len(kept)), layout="constrained")
    axes = figure.subplots()
    known = table.nan_to_num()
    image = _heat_map(axes, table, min(0.0, known.min().item()), known.max().item())
    figure.colorbar(image, ax=axes, label="mean routing weight")
    ends = list(itertools.accumulate(kernels))
    for end in ends[:-1]:
        axes.axvline(end - 0.5, color="white", linewidth=5)
    prefix, short = _shortened(names)
    titles = [
        f"{name}\n{count} of {layers[full].load.numel()} kernels" if count < layers[full].load.numel() else name
        for full, name, count in zip(names, short, kernels, strict=True)
    ]
    axes.set_xticks([end - (count + 1) / 2 for end, count in zip(ends, kernels, strict=True)], titles, fontsize=8)
    where = f" of {prefix}" if prefix else ""
    axes.set_xlabel(f"layer{where}, and in each its kernels", fontsize=9)
    labels = [class_names[index] if class_names else str(index) for index in kept.tolist()]
    axes.set_yticks(range(len(kept)), [_ending(label, 24) for label in labels], fontsize=8)
    axes.set_ylabel("class")
    axes.tick_params(length=0)
    some = f": the {len(kept)} of {total} classes that differ most" if len(kept) < total else ""
    axes.set_title(f"Mean routing weights by class{some}", fontsize=11)
    return figure


def similarity(matrix: Tensor, names: Sequence[str]) -> Figure:
    """Draw how alike the layers route images (``statistics.similarity``)."""
    side = 3 + min(6.0, 0.25 * len(names))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(_heat_map(axes, matrix, 0, 1), ax=axes, label="linear CKA")
    axes.set_title("How alike the layers route images")
    every, short, label = _named(names)
    axes.set_yticks(range(0, len(names), every), short, fontsize=8)
    axes.set_ylabel(label, fontsize=9)
    axes.set(xticks=[], xlabel="the same layers")
    return figure


def examples(title: str, images: Tensor, shares: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> Figure:
    """Draw, a row a kernel, the images that give it the largest share of their routing weights.

    Args:
        title: above the figure.
        images: ``(K, k, 3, h, w)``, bytes.
        shares: ``(K, k)``, the kernel's share of each image's routing weights; NaN where there is no image.
        labels: ``(K, k)``, -1 where it is not known.
        class_names: names of the classes, or empty.
    """
    kernels, count, _, height, width = images.shape
    shown = min(ROWS_OF_EXAMPLES, kernels)
    gap = max(3, height // 4)  # below each image, for the name of its class
    canvas = np.full((shown * (height + gap), count * (width + 2), 3), 255, dtype=np.uint8)
    inches = (0.75 * count, 0.75 * shown * (height + gap) / (width + 2))
    size = (inches[0] + 0.7, inches[1] + 0.6)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.6 / size[0], 0.05 / size[1], inches[0] / size[0], inches[1] / size[1]))
    for row in range(shown):
        for column in range(count):
            top, left = row * (height + gap), column * (width + 2)
            if shares[row, column].isnan():
                continue
            canvas[top : top + height, left : left + width] = images[row, column].permute(1, 2, 0).numpy()
            label = int(labels[row, column])
            name = "" if label < 0 else _ending(class_names[label], 12) if class_names else str(label)
            place = (left + width / 2, top + height + gap / 2)
            axes.text(*place, f"{name} ({shares[row, column]:.2f})".lstrip(), ha="center", va="center", fontsize=6)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_yticks(
        [row * (height + gap) + height / 2 for row in range(shown)], [str(row) for row in range(shown)], fontsize=8
    )
    axes.set(xticks=[], ylabel="kernel")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    some = f", {shown} of {kernels} kernels" if shown < kernels else ""
    axes.set_title(f"{title}{some}\nclass (the kernel's share of the routing weights)", fontsize=9)
    return figure


def group_counts(history: Mapping[str, Sequence[int]], epochs: Sequence[int], most: Mapping[str, int]) -> Figure:
    """Draw the number of groups of each layer over the epochs, and at the end against depth (as DGConv's paper does).

    Args:
        history: numbers of groups by layer, after each of the epochs.
        epochs: how many were over, ascending; of a single one only the end is drawn.
        most: how many groups each layer can have.
    """
    table = torch.tensor([list(counts) for counts in history.values()])
    figure = Figure(figsize=(4.5 if len(epochs) == 1 else 9, _height(len(history))), layout="constrained")
    *over_time, at_end = figure.subplots(1, min(2, len(epochs)), sharey=True, squeeze=False)[0]
    for axes in over_time:
        highest = max(1, math.ceil(math.log2(int(table.max()))))
        edges = [epochs[0] - 0.5, *((a + b) / 2 for a, b in itertools.pairwise(epochs)), epochs[-1] + 0.5]
        levels = BoundaryNorm([2 ** (power - 0.5) for power in range(highest + 2)], 256)
        shown = axes.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table.numpy(), norm=levels)
        bar = figure.colorbar(shown, ax=axes, label="groups")
        bar.set_ticks([2**power for power in range(highest + 1)], labels=[str(2**p) for p in range(highest + 1)])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    step = math.ceil(max(matrix.shape) / SIDE_OF_MEMBERSHIP)
    small = torch.nn.functional.avg_pool2d(matrix[None].float(), step, ceil_mode=True)[0] if step > 1 else matrix
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    extent = (-0.5, inputs - 0.5, outputs - 0.5, -0.5)
    axes.imshow(small.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=extent)
    axes.set(xlabel="channel of the input", ylabel="channel of the output")
    some = f"\naveraged over {step}x{step} channels" if step > 1 else ""
    axes.set_title(f"{_ending(name, 40)}: black is connected{some}", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
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
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


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
    where, some = f" of {prefix}" if prefix else "", f", one of {every} is named" if every > 1 else ""
    return every, short[::every], f"layer{where}, from input to output{some}"


def _shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Take off the modules that all names have in common, and the beginnings of long ones."""
    paths = [name.split(".") for name in names]
    common = 0
    while len(paths) > 1 and all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    return ".".join(paths[0][:common]), [_ending(".".join(path[common:])) for path in paths]


def _ending(name: str, length: int = 20) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _width(layers: int) -> float:
    return 4 + min(8.0, 0.25 * layers)


def _height(layers: int) -> float:
    return 2.5 + min(8.0, 0.2 * layers)
