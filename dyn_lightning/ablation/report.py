"""The report of a study: Markdown, CSV, JSON, plots, and one page that opens without a network."""

import csv
import html
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from dyn_lightning.ablation.study import Published, Study
from dyn_lightning.analysis.html import document, picture, table
from dyn_lightning.checks import matches
from dyn_lightning.record import write_json, write_whole

# The columns of cells.csv.
CELLS = (
    *("arm", "seed", "status", "value", "seconds", "device_hours", "peak_memory", "parameters", "multiply_adds"),
    *("device", "devices", "commit", "folder"),
)


# The columns of conditions.csv.
CONDITIONS = ("arm", "seed", "name", "mode", "images", "top1", "top1_deviation", "top5", "loss", "published")


class Table(NamedTuple):
    """A table of the report, and what stands above it."""

    title: str
    text: str
    head: list[str]
    rows: list[list[str]]


class Plot(NamedTuple):
    """Summaries by name, to be drawn."""

    title: str
    label: str
    summaries: Mapping[str, Mapping[str, Any]]


def write_report(folder: Path, study: Study, results: dict[str, Any], left_aside: Sequence[str] = ()) -> None:
    """Write ``results.json``, ``cells.csv``, ``conditions.csv``, ``report.md``, ``index.html`` and the plots.

    Args:
        folder: where to.
        study: what was asked.
        results: of ``results.gather``.
        left_aside: names of cells that are of an earlier version of the study.
    """
    write_json(folder / "results.json", results)
    write_whole(folder / "cells.csv", _csv(CELLS, results["cells"]))
    published = study.published.values if study.published else {}
    conditions = [
        {"arm": row["arm"], "seed": row["seed"], **each, "published": published.get(each["name"])}
        for row in results["cells"]
        for each in row["conditions"].values()
    ]
    if conditions:
        write_whole(folder / "conditions.csv", _csv(CONDITIONS, conditions))
    tables, plots = [_facts(results), _arms(study, results), *_shown(results)], []
    if len(results["arms"]) > 1 or not results["conditions"]:
        plots.append(Plot(study.metric, study.metric, {arm: each["metric"] for arm, each in results["arms"].items()}))
    for arm, conditions in results["conditions"].items():
        tables.append(_conditions(study, arm, conditions))
        plots.append(Plot(f"{arm} under changed routing", "top-1", {n: each["top1"] for n, each in conditions.items()}))
    plots = [plot for plot in plots if any(each["values"] for each in plot.summaries.values())]
    paths = [
        folder / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '_', plot.title).strip('_')}.png"
        for number, plot in enumerate(plots, 1)
    ]
    for plot, path in zip(plots, paths, strict=True):
        drawn = io.BytesIO()
        draw(plot).savefig(drawn, format="png")
        write_whole(path, drawn.getvalue())
    notes = _notes(study, results, left_aside)
    failed = {f"{row['arm']}, seed {row['seed']}": row["failure"] for row in results["cells"] if row["failure"]}
    text = _markdown(study, tables, [path.name for path in paths], notes, failed)
    page = document(
        study.question,
        *(
            f"<h2>{html.escape(each.title)}</h2><p>{html.escape(each.text)}</p>{table(each.head, each.rows)}"
            for each in tables
        ),
        *(
            picture(plot.title, path, "Points are seeds; the bar is the mean and its 95 % confidence interval.")
            for plot, path in zip(plots, paths, strict=True)
        ),
        "<h2>Notes</h2><ul>",
        *(f"<li>{html.escape(note)}</li>" for note in notes),
        "</ul>",
        *(f"<h2>Failed: {html.escape(name)}</h2><pre>{html.escape(log)}</pre>" for name, log in failed.items()),
    )
    write_whole(folder / "report.md", text.encode())
    write_whole(folder / "index.html", page.encode())


def draw(plot: Plot) -> Figure:
    """Draw a point a seed, and the mean with its confidence interval, in per cent; a row a name."""
    names = list(plot.summaries)
    figure = Figure(figsize=(7, 1.4 + 0.4 * len(names)), layout="constrained", dpi=110)
    axes = figure.subplots()
    for row, name in enumerate(names):
        each = plot.summaries[name]
        values = [100 * value for value in each["values"].values()]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", markersize=5, alpha=0.5)
        if each["mean"] is not None:
            width = None if each["half_width"] is None else 100 * each["half_width"]
            axes.errorbar(100 * each["mean"], row + 0.22, xerr=width, fmt="|", color="black", capsize=4, markersize=10)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    title = plot.title.replace("$", r"\$")  # which would begin a formula
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"{plot.label}, %", title=title)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _facts(results: dict[str, Any]) -> Table:
    rows = results["cells"]
    done = [row for row in rows if row["status"] == "finished"]
    seconds = sum(row["seconds"] or 0 for row in rows)
    packages = sorted({f"{name} {version}" for row in done for name, version in row["packages"].items()})
    facts = {
        "cells": f"{len(done)} of {len(rows)} finished",
        "trained": "; ".join(dict.fromkeys(row["trained"] for row in rows)),
        "device": "; ".join(sorted({row["device"] for row in done})),
        "training": f"{seconds:.0f} s, {sum(row['device_hours'] or 0 for row in rows):.4g} device-hours",
        "Python and packages": ", ".join([*sorted({f"Python {row['python']}" for row in done}), *packages]),
        "commit": ", ".join(
            sorted({f"{row['commit']}{' and changes' * row['changed']}" for row in done if row["commit"]})
        ),
    }
    return Table("Run", "", [], [[name, value] for name, value in facts.items() if value])


def _arms(study: Study, results: dict[str, Any]) -> Table:
    rows = []
    for arm, each in results["arms"].items():
        difference = each["difference"]
        rows.append(
            [
                arm,
                _mean(each["metric"]),
                _interval(each["metric"]),
                str(len(each["metric"]["values"])),
                "" if difference is None else f"{_mean(difference, sign='+')} {_interval(difference)}".strip(),
                _published(study.published, arm),
                _scaled(each["parameters"], 1e6, 3),
                _scaled(each["multiply_adds"], 1e6, 2),
                _scaled(each["seconds"], 1, 1),
                _scaled(each["device_hours"], 1, 4),
                _scaled(each["peak_memory"], 1 << 20, 0),
            ]
        )
    difference = f"minus {study.baseline}, paired by seed" if study.baseline else "difference"
    head = ["", f"{study.metric}, % ± s.d.", "95 % interval", "seeds", difference, _source(study.published)]
    head += ["M parameters", "M multiply-adds", "seconds", "device-hours", "peak memory, MiB"]
    return _without_empty(Table("Trained networks", "", head, rows))


def _shown(results: dict[str, Any]) -> list[Table]:
    shown = {arm: each["shown"] for arm, each in results["arms"].items() if each["shown"]}
    names = dict.fromkeys(name for each in shown.values() for name in each)
    rows = [
        [name, *(", ".join(f"{value:.4g}" for value in each.get(name, {}).values()) for each in shown.values())]
        for name in names
    ]
    text = "A number a seed; what is not of the validation or the test is as it was after the last epoch."
    return [Table("Recorded numbers", text, ["", *shown], rows)] if rows else []


def _conditions(study: Study, arm: str, conditions: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            _mean(each["top1"]),
            _interval(each["top1"]),
            str(len(each["top1"]["values"])),
            _scaled(each["deviation_of_draws"], 0.01, 2),
            _published(study.published, name),
        ]
        for name, each in conditions.items()
    ]
    head = [
        "routing weights",
        "top-1, % ± s.d.",
        "95 % interval",
        "seeds",
        "s.d. of the draws",
        _source(study.published),
    ]
    text = "One checkpoint a seed, tested with changed routing weights; nothing is trained."
    return _without_empty(Table(f"{arm} under changed routing", text, head, rows))


def _notes(study: Study, results: dict[str, Any], left_aside: Sequence[str]) -> list[str]:
    notes = [f"differs from the paper: {text}" for text in study.differs]
    if study.published is not None:
        second = " (second-hand: quoted by another text)" if study.published.tag == "second-hand" else ""
        notes.insert(0, f"published: {study.published.source}{second}. {study.published.setup}".strip())
    waiting = [f"{row['arm']}, seed {row['seed']}" for row in results["cells"] if row["status"] == "unfinished"]
    recorded = [name for row in results["cells"] for name in row["metrics"]]
    unseen = [glob for glob in study.show if recorded and not any(matches(name, [glob]) for name in recorded)]
    notes += [f"show: no cell has recorded a number {glob!r}" for glob in unseen]
    notes += [f"not run to the end: {'; '.join(waiting)}"] if waiting else []
    done = [row for row in results["cells"] if row["status"] == "finished"]
    nothing = [f"{row['arm']}, seed {row['seed']}" for row in done if row["value"] is None]
    notes += (
        [f"has no {study.metric} (NaN, or not recorded), so is in no mean: {'; '.join(nothing)}"] if nothing else []
    )
    devices = sorted({row["devices"] for row in done if row["devices"]})
    notes += [f"the cells were trained on different numbers of devices: {devices}"] if len(devices) > 1 else []
    notes += [f"left aside, of an earlier version of the study: {name}" for name in left_aside]
    commits = {row["commit"] for row in results["cells"] if row["commit"]}
    notes += ["the cells were trained by different commits"] if len(commits) > 1 else []
    again = [f"{row['arm']}, seed {row['seed']}" for row in results["cells"] if (row["starts"] or 1) > 1]
    notes += [f"went on after an interruption, whose time is not counted: {'; '.join(again)}"] if again else []
    return notes


def _markdown(
    study: Study, tables: Sequence[Table], pictures: Sequence[str], notes: Sequence[str], failed: Mapping[str, str]
) -> str:
    parts = [f"# {_escaped(study.question)}"]
    for each in tables:
        head = each.head or ["", ""]
        rows = [map(_escaped, head), ["---"] * len(head), *(map(_escaped, row) for row in each.rows)]
        table_lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {_escaped(each.title)}", *([each.text] if each.text else []), table_lines]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in pictures]
    parts += ["## Notes", "\n".join(f"- {_escaped(note)}" for note in notes)] if notes else []
    parts += [f"## Failed: {_escaped(name)}\n\n{textwrap.indent(log, '    ')}" for name, log in failed.items()]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Let Markdown show a text as it is."""
    return re.sub(r"([\\|*<>`$])", r"\\\1", text).replace("\n", " ")


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _without_empty(each: Table) -> Table:
    """Leave out columns that say nothing."""
    kept = [place for place in range(len(each.head)) if place == 0 or any(row[place] for row in each.rows)]
    return each._replace(head=[each.head[p] for p in kept], rows=[[row[p] for p in kept] for row in each.rows])


def _mean(summary: Mapping[str, Any], sign: str = "") -> str:
    if summary["mean"] is None:
        return ""
    deviation = "" if summary["deviation"] is None else f" ± {100 * summary['deviation']:.2f}"
    return f"{100 * summary['mean']:{sign}.2f}{deviation}"


def _interval(summary: Mapping[str, Any]) -> str:
    if summary["half_width"] is None:
        return ""
    low, high = (100 * (summary["mean"] + side * summary["half_width"]) for side in (-1, 1))
    return f"[{low:.2f}, {high:.2f}]"


def _published(published: Published | None, name: str) -> str:
    value = None if published is None else published.values.get(name)
    return "" if value is None else f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


def _source(published: Published | None) -> str:
    second = published is not None and published.tag == "second-hand"
    return f"published, %{' (second-hand)' * second}"


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"
