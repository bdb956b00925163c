"""Draw what was measured: ``python -m experiments.benchmarks.dynamic_conv.plots FOLDER FILE.json [...]``.

The files are what ``python -m experiments.benchmarks.dynamic_conv --out`` wrote; of several, of the same machine and
settings, the results are drawn together, each from the last file that has it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

mpl.use("agg")
COLOURS = {
    "timm": "#7f7f7f",
    "grouped": "#9ecae1",
    "matmul": "#fdae6b",
    "mixture": "#c994c7",
    "chunked": "#a1d99b",
    "cpp": "#08519c",
    "triton": "#8c6d31",
    "auto": "#d62728",
}
NAMES = {"timm": "timm's CondConv2d", "auto": "auto (this package)"}


def draw(measured: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a picture for each part that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, results in measured["results"].items():
        if part in PLOTS:
            figure = PLOTS[part](results)
            how = f"K = {measured['kernels']}, " * (part != "growth") + measured["dtype"]
            how += ", channels_last" * measured["channels_last"]
            how += ", compiled" * (part != "layers" and measured.get("compiled", False))
            where = f"{measured['device']}, torch {measured['torch']}, {measured['date']}"
            figure.supxlabel(f"{how}; {where}", fontsize=8)
            paths.append(folder / f"{part}.png")
            figure.savefig(paths[-1], dpi=110)
            plt.close(figure)
    return paths


def networks(results: list[dict[str, Any]]) -> Any:
    """Bars of each method's time beside the static network's."""
    jobs = list(dict.fromkeys(result["job"] for result in results))
    figure, axes = plt.subplots(len(jobs), 1, figsize=(11, 3.4 * len(jobs)), layout="constrained", squeeze=False)
    for job, axis in zip(jobs, axes[:, 0], strict=True):
        rows = [result for result in results if result["job"] == job]
        rows.sort(key=lambda row: (-row["size"], row["network"]))  # files come in any order
        found = {method for row in rows for method in row["milliseconds"]}  # older runs lack some
        shown = {method: colour for method, colour in COLOURS.items() if method in found}
        width = 0.8 / len(shown)
        for position, (method, colour) in enumerate(shown.items()):
            times = [row["milliseconds"] for row in rows]
            ratios = [time.get(method, math.nan) / time["static"] for time in times]
            places = [place + (position - (len(shown) - 1) / 2) * width for place in range(len(rows))]
            faster = [ratio - 1 for ratio in ratios]  # up is slower than static, down is faster
            axis.bar(places, faster, width, bottom=1, color=colour, label=NAMES.get(method, method))
        axis.set_xticks(range(len(rows)), [f"{row['network']}\n{row['size']} px" for row in rows], fontsize=8)
        axis.set_ylabel("time / static network's")
        axis.set_title(_title(job, rows), fontsize=10)
        _logarithmic(axis)
        axis.axhline(1, color="black", linewidth=0.8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=8, fontsize=8, loc="outside upper center")
    return figure


def layers(results: list[dict[str, Any]]) -> Any:
    """Each layer shape as a point: timm's time and ours, both beside the static convolution's."""
    jobs = list(dict.fromkeys(result["job"] for result in results))
    figure, axes = plt.subplots(1, len(jobs), figsize=(4.4 * len(jobs), 5), layout="constrained", squeeze=False)
    for job, axis in zip(jobs, axes[0], strict=True):
        kinds: dict[str, list[tuple[float, float]]] = {"1x1": [], "depthwise": [], "k x k": []}
        rows = [result for result in results if result["job"] == job]
        for row in rows:
            times, (_, _, size, _, _, groups, _) = row["milliseconds"], row["shape"]
            kind = "1x1" if size == 1 else "depthwise" if groups > 1 else "k x k"
            kinds[kind].append((times["timm"] / times["static"], times[row["auto"]] / times["static"]))
        for kind, points in kinds.items():
            if not points:
                continue
            axis.scatter(*zip(*points, strict=True), s=14, alpha=0.7, label=f"{kind} ({len(points)})")
        numbers = [number for points in kinds.values() for point in points for number in point]
        ends = (min(numbers) / 1.3, max(numbers) * 1.3)
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("timm's CondConv2d / static convolution")
        axis.set_title(_title(job, rows), fontsize=10)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("auto / static convolution\n(below the line: faster than timm's)")
    return figure


def growth(results: list[dict[str, Any]]) -> Any:
    """Milliseconds over K, a line a batch."""
    figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    for result, colour in zip(results, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(results))), strict=True):
        times = dict(result["milliseconds"])
        static = times.pop("static")
        kernels = [int(name.removeprefix("K = ")) for name in times]
        axis.plot(kernels, list(times.values()), marker="o", color=colour, label=f"batch {result['batch']}")
        axis.axhline(static, color=colour, linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(kernels, [str(number) for number in kernels])
    _logarithmic(axis)
    axis.set_xlabel("K, the kernels that are mixed")
    axis.set_ylabel("milliseconds a training step")
    axis.set_title("ResNet-18, 32 px: dynamic (lines) and static (dotted)", fontsize=10)
    axis.legend(fontsize=8)
    return figure


def _title(job: str, rows: list[dict[str, Any]]) -> str:
    return f"{job.removesuffix(' of one')}, batch {rows[0]['batch']}"


def _logarithmic(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", which="major", linewidth=0.3)


MEASURED = ("rounds", "milliseconds", "spread", "MiB", "work", "auto")
PLOTS = {"networks": networks, "layers": layers, "growth": growth}


def main(folder: str, *files: str) -> None:
    """Draw the results of some files together."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for part, results in run["results"].items():
            found.setdefault(part, {}).update({_what(result): result for result in results})
    together = {part: list(results.values()) for part, results in found.items()}
    print(*draw({**runs[-1], "results": together}, Path(folder)), sep="\n")


def _what(result: dict[str, Any]) -> str:
    """Say what was measured, without how often and what came out."""
    return json.dumps({name: value for name, value in result.items() if name not in MEASURED})


if __name__ == "__main__":
    main(*(sys.argv[1:] if len(sys.argv) > 2 else sys.exit("name the folder, then the files")))
