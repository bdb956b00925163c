"""Fit the cost model of ``per_sample/choice.py``:
``python -m experiments.benchmarks.dynamic_conv.fit_costs FILE.json [...]``.

The files are what ``python -m experiments.benchmarks.dynamic_conv layers --out FOLDER`` wrote (also with ``--kernels``
other than 4), all with freed memory kept or none. For Intel's processors and others, and for each kind of layer and of
job, each way to compute is a line in what there is to do (``Costs``).
Prints the numbers for ``choice.py``, the cases where a choice by them is more than 10 % slower than the best method,
and how good the choices of today's ``choice.py`` are: in each file, and in those of the same cases together, since a
single time of tens of microseconds may be off by a tenth.
"""

import json
import math
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from scipy.special import softmax

from dyn_lightning.per_sample.case import Case, case_of
from dyn_lightning.per_sample.choice import (
    Costs,
    choose,
    cpp_work,
    first_within,
    kind_of,
    methods_within,
    mixed_first_work,
    mixture_work,
)
from dyn_lightning.per_sample.reduction import plan_of
from experiments.benchmarks.dynamic_conv.layers import quality

WORKS = (mixed_first_work, mixture_work, cpp_work)  # in the order of `Costs`
# A choice counts as wrong in part where the expected times are close: their distance, as a logarithm, is taken in these
# units, first in the coarse one, with which what is lost has fewer local minima. And what it costs to move the numbers
# away from the lines, which keeps those that no choice depends on.
UNSURE, STAY = (0.1, 0.03), 1e-3

Result = tuple[Case, str, dict[str, float]]  # the times are milliseconds by method


def cases(path: str) -> list[tuple[Case, dict[str, Any]]]:
    """Read what was measured of each layer shape."""
    measured = json.loads(Path(path).read_text())
    if "CPU" not in measured["device"] or measured["dtype"] != "float32":
        raise SystemExit(f"{path} is of {measured['device']}, {measured['dtype']}: the model is of a CPU in float32")
    found = []
    for result in measured["results"]["layers"]:
        in_channels, out_channels, size, stride, padding, groups, pixels = result["shape"]
        images = (result["batch"], in_channels, pixels, pixels)
        weight = (measured["kernels"], out_channels, in_channels // groups, size, size)
        layout = "channels_last" if measured["channels_last"] else "contiguous"
        training = result["training"]
        plan = plan_of(images, weight, (stride, stride), (padding, padding), (1, 1), groups, training)
        if tuple(result["kernel"]) != plan.weight[3:]:
            continue  # it was computed otherwise than today
        case = case_of(plan, layout, torch.float32, "cpu", training, keeps_memory=measured["keeps_freed_memory"])
        found.append((case._replace(intel=measured["intel"]), result))
    return found


def decided_by_costs(rows: list[tuple[Case, dict[str, Any]]]) -> list[Result]:
    """Give what is fitted to: the times of methods that may be taken."""
    return [
        (case, first_within(case, within), {name: ms for name, ms in result["milliseconds"].items() if name in within})
        for case, result in rows
        if not case.is_depthwise() and "mixture" in (within := methods_within(case))
    ]


def fit(results: list[Result]) -> Costs:
    """Fit one kind of layer and job: the line of each way, then all numbers so that little time is lost by choices."""
    counted, starts = _counted(results), [np.array(numbers) for numbers in lines(results) if numbers]
    designs = [np.array([work(case) for case, *_ in counted]) for work in WORKS[: len(starts)]]
    times = np.array([[times.get(name, math.inf) for name in _ways(first)] for _, first, times in counted])
    there = np.isfinite(times)[:, : len(starts)]
    over = np.log(np.where(there, times[:, : len(starts)] / times.min(1, keepdims=True), 1))
    ends = np.cumsum([len(start) for start in starts])

    def costs_of(shifts: np.ndarray) -> list[np.ndarray]:
        return [start * np.exp(part) for start, part in zip(starts, np.split(shifts, ends[:-1]), strict=True)]

    def lost(shifts: np.ndarray, unsure: float) -> float:
        expected = np.stack([design @ costs for design, costs in zip(designs, costs_of(shifts), strict=True)], 1)
        chances = softmax(np.where(there, -np.log(expected) / unsure, -np.inf), axis=1)
        return float(np.mean(np.sum(chances * over, axis=1)) + STAY * shifts @ shifts)

    shifts = np.zeros(ends[-1])
    for unsure in UNSURE:
        shifts = minimize(lost, shifts, unsure, tol=1e-8).x
    return Costs(*(tuple(costs.tolist()) for costs in costs_of(shifts)))


def lines(results: list[Result]) -> Costs:
    """Fit the times of each way alone, by least squares of the relative error, with no negative number."""
    numbers = []
    for place, work in enumerate(WORKS):
        found = [(work(case), times.get(_ways(first)[place])) for case, first, times in _counted(results)]
        # A picosecond is 1e-9 of the milliseconds that were measured.
        design = np.array([[number / time * 1e-9 for number in work] for work, time in found if time is not None])
        numbers.append(tuple(nnls(design, np.ones(len(design)))[0].tolist()) if len(design) else ())
    return Costs(*numbers)


def _counted(results: list[Result]) -> list[Result]:
    """Give the results, those with K = 4 twice: it is the number of the papers."""
    return results + [row for row in results if row[0].weight[0] == 4]


def _ways(first: str) -> tuple[str, ...]:
    return first, "mixture", "cpp"


def main(paths: list[str]) -> None:
    """Print the fitted numbers, the choices by them that would not be best, and how good those of ``choice.py`` are."""
    measured = {path: cases(path) for path in paths}
    results = [result for rows in measured.values() for result in decided_by_costs(rows)]
    for intel, kind in sorted({(case.intel, kind_of(case)) for case, *_ in results}, reverse=True):
        these = [row for row in results if (row[0].intel, kind_of(row[0])) == (intel, kind)]
        costs = fit(these)
        rounded = ", ".join(f"({', '.join(f'{number:.3g}' for number in numbers)})" for numbers in costs)
        processor = "Intel's" if intel else "others"
        print(f"{processor}, {kind}: Costs({rounded}),  # {len(these)} cases, but for")
        for case, first, times in these:
            chosen, best = costs.best(case, first, [*times]), min(times.values())
            if times[chosen] > 1.1 * best:
                rounded = {name: round(time, 2) for name, time in times.items()}
                print(f"    {times[chosen] / best:.2f} {chosen:8} {(*case.input,)} {(*case.weight,)}", rounded)
    together: dict[tuple[Case, ...], list[Any]] = {}
    for path, rows in measured.items():
        report(path, rows)
        together.setdefault(tuple(case for case, _ in rows), []).append(rows)
    for same_cases, runs in together.items():
        if len(runs) > 1:
            title = f"K = {same_cases[0].weight[0]}, {len(runs)} runs together"
            report(title, [mean(same) for same in zip(*runs, strict=True)])


def mean(same: tuple[tuple[Case, dict[str, Any]], ...]) -> tuple[Case, dict[str, Any]]:
    """Give a case with the geometric mean of its times in several runs."""
    times = [result["milliseconds"] for _, result in same]
    case, result = same[0]
    return case, result | {"milliseconds": {name: geometric_mean(time[name] for time in times) for name in times[0]}}


def report(title: str, rows: list[tuple[Case, dict[str, Any]]]) -> None:
    """Print how good the choices of ``choice.py`` are, job by job."""
    for job in dict.fromkeys(result["job"] for _, result in rows):
        # A machine without a compiler has no times of our C++.
        choices = [(result, choose(case)) for case, result in rows if result["job"] == job]
        chosen = [result | {"auto": auto} for result, auto in choices if auto in result["milliseconds"]]
        print(f"{title}, {job}, by the numbers of choice.py: {quality(chosen)}")


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit("name the files"))
