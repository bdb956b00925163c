"""What came out of a study: a row a cell, and what they say together about arms and conditions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from dyn_lightning.ablation.cell import CellFolder
from dyn_lightning.ablation.study import Cell, Study
from dyn_lightning.checks import matches

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Some values of one quantity.

    Attributes:
        values: by seed.
        mean: of them; None where there is none.
        deviation: their standard deviation; None below two.
        half_width: of the interval that holds the true mean with a confidence of 95 %, by Student's t; None below two.
    """

    values: Mapping[int, float]
    mean: float | None
    deviation: float | None
    half_width: float | None

    @classmethod
    def of(cls, values: Mapping[int, float]) -> "Summary":
        """Summarise values by seed.

        Example:
            >>> found = Summary.of({1: 1.0, 2: 2.0, 3: 3.0})
            >>> found.mean, found.deviation, round(found.half_width, 3)
            (2.0, 1.0, 2.484)
        """
        found, count = list(values.values()), len(values)
        mean = statistics.fmean(found) if found else None
        deviation = statistics.stdev(found) if count > 1 else None
        t = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) if count > 1 else math.nan
        return cls(dict(values), mean, deviation, None if deviation is None else t * deviation / math.sqrt(count))


def gather(study: Study, cells: Sequence[tuple[Cell, CellFolder]]) -> dict[str, Any]:
    """Read what the cells left.

    Args:
        study: what they are of.
        cells: with their folders.

    Returns:
        Plain values: ``study``, what was asked; ``cells``, a row each; ``arms`` with a summary of the metric, of its
        differences to the baseline, of the costs and of what is shown beside; ``conditions`` by arm, with a summary of
        the accuracy.
    """
    rows = [_row(study, cell, folder) for cell, folder in cells]
    of_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in study.arms}
    of_arm = {arm: found for arm, found in of_arm.items() if found}
    values = {
        arm: {row["seed"]: row["value"] for row in found if row["value"] is not None} for arm, found in of_arm.items()
    }
    base = values.get(study.baseline or "", {})
    arms = {}
    for arm, found in of_arm.items():
        paired = {seed: value - base[seed] for seed, value in values[arm].items() if seed in base}
        arms[arm] = {
            "metric": asdict(Summary.of(values[arm])),
            "difference": None if arm == study.baseline or not base else asdict(Summary.of(paired)),
            **{key: found[0][key] for key in ("parameters", "multiply_adds")},
            **{key: _mean([row[key] for row in found]) for key in ("seconds", "device_hours", "peak_memory")},
            "shown": _shown(study.show, found),
        }
    asked = {key: getattr(study, key) for key in ("question", "baseline", "metric", "differs")}
    published = None if study.published is None else asdict(study.published)
    return {"study": {**asked, "published": published}, "cells": rows, "arms": arms, "conditions": _conditions(of_arm)}


def _row(study: Study, cell: Cell, folder: CellFolder) -> dict[str, Any]:
    record, inspected = folder.record or {}, folder.inspected or {}
    failure, memory = folder.failure, record.get("peak_memory_bytes", {})
    status = "finished" if folder.finished else "failed" if failure else "unfinished"
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "trained": _trained(cell.config),
        "name": cell.name,
        "status": status,
        "value": record.get("metrics", {}).get(study.metric),
        "metrics": record.get("metrics", {}),
        "parameters": cell.facts["parameters"],
        "multiply_adds": cell.facts["multiply_adds"],
        **{key: record.get(key) for key in ("seconds", "device_hours", "starts", "device", "devices", "folder")},
        "peak_memory": memory.get("device", memory.get("host")),
        "commit": (record.get("git") or {}).get("commit"),
        "changed": bool((record.get("git") or {}).get("status")),
        "packages": record.get("packages", {}),
        "python": record.get("python"),
        "conditions": {row["name"]: row for row in inspected.get("conditions", [])},
        "failure": failure,
    }


def _shown(globs: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Give the recorded numbers that are shown, by seed, in the order of the globs."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    chosen = dict.fromkeys(name for glob in globs for name in names if matches(name, [glob]))
    found = {name: {row["seed"]: row["metrics"].get(name) for row in rows} for name in chosen}
    return {name: {seed: v for seed, v in values.items() if v is not None} for name, values in found.items()}


def _trained(config: Mapping[str, Any]) -> str:
    """Say which network a cell trains, without its layers, and on which data."""
    model, data = config.get("model", {}), config.get("data", {})
    options = ", ".join(f"{key}={value}" for key, value in (model.get("backbone_args") or {}).items())
    given = data.get("init_args") or {}
    size = f", {given['image_size']} px" if "image_size" in given else ""
    name = str(data.get("class_path", "")).rpartition(".")[2]
    return f"{model.get('backbone')}({options}) on {name}{size}"


def _conditions(of_arm: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for arm, rows in of_arm.items():
        names = list(dict.fromkeys(name for row in rows for name in row["conditions"]))
        for name in names:
            seen = {row["seed"]: row["conditions"][name] for row in rows if name in row["conditions"]}
            draws = [each["top1_deviation"] for each in seen.values() if each["top1_deviation"] is not None]
            found.setdefault(arm, {})[name] = {
                "top1": asdict(Summary.of({seed: each["top1"] for seed, each in seen.items()})),
                "deviation_of_draws": math.sqrt(statistics.fmean(np.square(draws))) if draws else None,
            }
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
