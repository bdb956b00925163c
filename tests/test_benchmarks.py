"""The benchmarks' arithmetic; what they measure is not tested."""

import itertools
import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.cost import parameters
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.choice import INTEL_COSTS, OTHER_COSTS, Costs, kind_of, mixed_first_work
from dyn_lightning.per_sample.geometry import Geometry
from experiments.benchmarks.dynamic_conv import fit_costs, growth, layers, modes, plots
from experiments.benchmarks.dynamic_conv.__main__ import main
from experiments.benchmarks.dynamic_conv.fit_costs import decided_by_costs, fit, lines
from experiments.benchmarks.dynamic_conv.growth import backward_flops, explained, work_of
from experiments.benchmarks.dynamic_conv.layers import quality
from experiments.benchmarks.dynamic_conv.networks import LEAST_STEPS, make_step
from experiments.benchmarks.dynamic_conv.plots import draw
from experiments.benchmarks.timing import in_slices, in_turn, interleaved, medians
from tests.command_line import ROOT
from tests.kept_runs import NETWORKS, RESULTS, networks


def test_the_slow_alone_are_given_up() -> None:
    order: list[str] = []
    each = {"static": 1.0, "fast": 5.0, "near": 14.0, "slow": 16.0}

    def measure(name: str) -> list[float]:
        order.append(name)
        return [each[name], 3 * each[name]]

    times = in_turn(measure, [*each], rounds=4, patience=3)
    assert medians(times) == {name: 2 * time for name, time in each.items()}
    assert [order.count(name) for name in each] == [4, 4, 4, 2]  # static does not count as the fastest
    assert {name: len(taken) for name, taken in times.items()} == {name: 2 * order.count(name) for name in each}
    assert sorted(order[:4]) == sorted(each)


def test_an_order_is_drawn_for_each_round() -> None:
    order: list[str] = []

    def measure(name: str) -> list[float]:
        order.append(name)
        return [1.0]

    for _ in range(2):
        random.seed(0)
        in_turn(measure, [*"abcdefghijkl"], rounds=4)
    assert len({tuple(order[start : start + 12]) for start in range(0, 96, 12)}) == 8


def test_interleaved_calls_the_short_several_times() -> None:
    calls: list[int] = []
    interleaved({"short": lambda: calls.append(1)}, rounds=1, least_ms=10_000)  # a busy machine may take ms a call
    assert len(calls) == 2 + 100


BUSY = "import time\nwhile time.process_time() < {seconds}: pass"


@pytest.mark.skipif(sys.platform == "win32", reason="processes are stopped by a signal of POSIX")
def test_processes_run_in_slices_to_their_ends(tmp_path: Path) -> None:
    seconds = {"long": 0.9, "short": 0.4}
    processes = {
        name: subprocess.Popen([sys.executable, "-c", BUSY.format(seconds=each)]) for name, each in seconds.items()
    }
    times = in_slices(processes, {"long": tmp_path, "short": tmp_path / "never there"}, slice=0.1)
    for name, each in seconds.items():
        assert times[name][0] > 0.9 * each  # a little of it was spent before the first slice
    assert times["long"][1] == times["long"][0]
    assert times["short"][1] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="processes are stopped by a signal of POSIX")
def test_a_process_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes .*3"):
        in_slices({"fails": subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])}, {"fails": tmp_path})


def test_lines_are_the_costs_that_made_the_times() -> None:
    costs = Costs((5000, 300, 40, 0, 0, 500, 800, 600), (30, 2000, 900, 5e8), (70, 400, 30, 3e8, 600))
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    results = []
    for channels, pixels, kernels in ((64, 56, 4), (128, 28, 2), (512, 7, 4), (64, 8, 8), (256, 2, 4), (96, 64, 16)):
        shapes = torch.Size((32, channels, pixels, pixels)), torch.Size((kernels, channels, channels, 3, 3))
        case = Case(*shapes, geometry, torch.float32, "cpu", False, True, True, 2**28, True, False)
        weights, kept = 32 * 9 * channels**2, pixels**2  # padded by one, the map keeps its size
        mixing = (5000 + 800 * (kept <= 4) + 300 * kernels + 40 * kept) * weights + 500 * 32 * channels * kept
        mixing += 600 * (weights * (channels >= 256) + 32 * channels * kept * (pixels == 64))
        mixture = kernels * (30 * kept * weights + 2000 * 9 * channels**2 + 900 * 32 * channels * kept) + 5e8
        turned = 3 * 32 * channels * kept  # the output's gradient, the output and the gradient of the input
        cpp = (70 + 400 * kernels + 30 * kept) * weights + 3e8 + 600 * turned
        times = {"grouped": mixing * 1e-9, "mixture": mixture * 1e-9, "cpp": cpp * 1e-9}
        results.append((case, "grouped", times))
    for found, made in zip(lines(results), costs, strict=True):
        assert found == pytest.approx(made, rel=1e-6)
    without = [(case, first, {name: times[name] for name in (first, "mixture")}) for case, first, times in results]
    assert lines(without).cpp == fit(without).cpp == ()


@pytest.mark.parametrize(
    ("size", "batch", "training", "counts"),
    [(1, 32, True, True), (1, 32, False, True), (1, 1, True, True), (1, 1, False, False), (3, 32, True, False)],
)
def test_what_goes_into_products_counts(size: int, batch: int, training: bool, counts: bool) -> None:
    geometry = Geometry((1, 1), (size // 2, size // 2), (1, 1), 1)
    shapes = torch.Size((batch, 96, 56, 56)), torch.Size((4, 16, 96, size, size))
    case = Case(*shapes, geometry, torch.float32, "cpu", False, True, training, 2**28, True, True)
    assert mixed_first_work(case)[4:6] == (counts * batch * 96 * 56 * 56, batch * 16 * 56 * 56)


def lost(costs: Costs, results: list[fit_costs.Result]) -> float:
    """Give by how much the choices by some costs are slower than the best ones, as a sum of logarithms."""
    total = 0.0
    for case, first, times in results:
        open_to = [name for name in (first, "mixture", "cpp") if name in times]
        total += math.log(times[costs.best(case, first, open_to)] / min(times[name] for name in open_to))
    return total


# Of the runs that costs are fitted to; those of one image have files of their own, or are in the same.
FITTED_TO = {
    "K = 4": ("layers", "one"),
    "K = 4, another run": ("layers_again", "one_again"),
    "K = 16": ("layers_k16", "one_k16"),
}
NOT_FITTED_TO = {
    "K = 4, not fitted to": ("layers_unfitted", "one_unfitted"),
    "K = 4, by glibc, not fitted to": ("by_glibc/layers", "by_glibc/one"),
}


def kept_runs(processor: str, names: Iterable[str]) -> list[Path]:
    return [path for name in names if (path := RESULTS / processor / f"{name}.json").exists()]


@pytest.mark.parametrize(
    ("costs_by_kind", "processor"), [(INTEL_COSTS, "intel"), (OTHER_COSTS, "other")], ids=["intel", "other"]
)
def test_the_costs_are_those_of_the_runs_that_are_here(costs_by_kind: dict[Any, Costs], processor: str) -> None:
    files = [path for names in FITTED_TO.values() for path in kept_runs(processor, names)]
    results = [result for file in files for result in decided_by_costs(fit_costs.cases(str(file)))]
    assert {case.intel for case, *_ in results} == {costs_by_kind is INTEL_COSTS}
    by_fit = by_lines = 0.0
    for kind, costs in costs_by_kind.items():
        these = [result for result in results if kind_of(result[0]) == kind]
        fitted = fit(these)
        for found, kept in zip(fitted, costs, strict=True):
            assert kept == pytest.approx(found, rel=0.01)
        assert lost(fitted, these) <= lost(lines(these), these)
        by_fit, by_lines = by_fit + lost(fitted, these), by_lines + lost(lines(these), these)
    assert by_fit < by_lines


def test_quality_compares_the_chosen_method() -> None:
    times = {"static": 1.0, "grouped": 2.0, "matmul": 4.0, "mixture": 8.0, "chunked": 16.0, "timm": 4.0}
    said = quality([{"auto": auto, "milliseconds": times} for auto in ("grouped", "grouped", "grouped", "matmul")])
    assert "within 10 % of the best method on 75.0% of 4 shapes, at most 2.00 times it" in said
    assert "1.68 times as fast as timm's CondConv2d (geometric mean; least 1.00, most 2.0;" in said


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_s_gradients_cost_as_much_as_itself(groups: int) -> None:
    x, weight = torch.randn(3, 4, 7, 6, requires_grad=True), torch.randn(6, 4 // groups, 3, 3, requires_grad=True)
    mapping = {torch.ops.aten.convolution_backward: backward_flops}
    with FlopCounterMode(display=False) as forward:
        y = F.conv2d(x, weight, groups=groups)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_growth_is_explained() -> None:
    results = []
    for batch in (8, 32, 128):
        work = {
            name: {"weights": 1e7 * k, "mixed weights": 1e5 * batch * k**0.5, "multiply-adds": 1e8 * batch * k**0.7}
            | {"images": batch}
            for name, k in (("static", 1), ("K = 2", 2), ("K = 4", 4), ("K = 16", 16))
        }
        times = {
            name: 3e-6 * w["weights"] + 5e-6 * w["mixed weights"] + 2e-8 * w["multiply-adds"] + 0.5 * w["images"]
            for name, w in work.items()
        }
        results.append({"batch": batch, "milliseconds": times, "work": work})
    said = explained(results)
    assert said.startswith(
        "time = 3 ns a weight + 5 ns a weight of the mixed kernels + 0.02 ns a multiply-add + 5e+05 ns an image"
    )
    assert "a weight: at least 28 bytes in float32, at 9.3 GB/s" in said
    assert "multiply-adds: 50 G a second" in said
    assert "batch 8, K = 4: weights " in said
    assert "error 0% (median), 0% (most)" in said


@pytest.mark.parametrize(("method", "mixed"), [("grouped", 5 * 4 * 3 * 9), ("mixture", 0)])
def test_work_is_counted(method: str, mixed: int) -> None:
    layer = DynamicConv2d(3, 4, 3, padding=1, num_kernels=2, method=method)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    work = work_of(model, 5, torch.device("cpu"))
    assert work["mixed weights"] == mixed
    assert work["weights"] == parameters(model)
    assert work["images"] == 5
    # Forward, and the weights' gradient; the images need none. Router and classifier are small.
    passes = 2 * 5 * 4 * 3 * 9 * growth.SIZE**2 * (2 if method == "mixture" else 1)
    assert passes <= work["multiply-adds"] < 1.1 * passes


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_are_measured_and_fitted(
    channels_last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[layers.Shape, list[str]] = {
        (8, 16, 1, 1, 0, 1, 4): ["N"],
        (16, 16, 3, 1, 1, 1, 4): ["N"],
        (8, 16, 1, 2, 0, 1, 32): ["N"],  # as without a stride on 16x16
    }
    monkeypatch.setattr(layers, "shapes", lambda: few)
    main(["layers", "--batch", "2", "--rounds", "1", "--out", str(tmp_path), *["--channels_last"] * channels_last])
    said = capsys.readouterr().out
    assert said.count("within 10 % of the best method on ") == len(layers.JOBS)
    results = json.loads((tmp_path / "dynamic_conv.json").read_text())["results"]["layers"]
    assert len(results) == len(layers.JOBS) * len(few)
    for row in results:
        assert min(*row["milliseconds"].values(), *row["MiB"].values()) > 0
        by_cpp = row["shape"][0] == 16 or (row["shape"][6] == 32 and not channels_last)
        assert ("cpp" in row["milliseconds"]) == by_cpp
    fit_costs.main([str(tmp_path / "dynamic_conv.json")])
    said = capsys.readouterr().out
    assert said.count(": Costs(") == 7
    assert said.count("by the numbers of choice.py: auto: within 10 %") == len(layers.JOBS)


def test_some_layers_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "960,160,1,1,0,1,1"
    main(["layers", "--jobs", "forward", "--shapes", shape, "--batch", "2", "--rounds", "1", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "dynamic_conv.json").read_text())["results"]["layers"]
    assert (row["job"], ",".join(map(str, row["shape"]))) == ("forward", shape)
    with pytest.raises(SystemExit):
        main(["layers", "--shapes", "1,2,3"])
    assert "'1,2,3' is no layer's shape in MobileNetV2 x0.5, " in capsys.readouterr().err


def test_of_several_passes_the_medians_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ((8, 16, 1, 1, 0, 1, 4), (16, 16, 3, 1, 1, 1, 4))
    monkeypatch.setattr(layers, "shapes", lambda: {shape: ["N"] for shape in few})
    order = []

    def measure(shape: layers.Shape, *_: object) -> tuple[dict[str, float], dict[str, float], str]:
        order.append(shape)
        time = {1: 4.0, 2: 9.0, 3: 5.0}[order.count(shape)]
        return {"static": 1.0, "matmul": time, "timm": 10.0}, dict.fromkeys(("static", "matmul", "timm"), 1.0), "matmul"

    monkeypatch.setattr(layers, "measure_layer", measure)
    main(["layers", "--jobs", "forward", "--passes", "3", "--out", str(tmp_path)])
    measured = json.loads((tmp_path / "dynamic_conv.json").read_text())
    assert measured["passes"] == 3
    assert [row["milliseconds"]["matmul"] for row in measured["results"]["layers"]] == [5.0, 5.0]
    assert order == [*few] * 3  # the second time of a layer comes after all the others
    assert capsys.readouterr().out.count("; 2.00 times as fast as timm") == 1


def test_runs_of_the_same_cases_are_also_taken_together() -> None:
    case, _ = fit_costs.cases(str(RESULTS / "intel/layers.json"))[0]
    runs = [(case, {"job": "forward", "milliseconds": {"static": 1.0, "timm": time}}) for time in (2.0, 8.0)]
    assert fit_costs.mean(tuple(runs)) == (case, {"job": "forward", "milliseconds": {"static": 1.0, "timm": 4.0}})


@pytest.mark.parametrize("processor", ["intel", "other"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "by_glibc"])
def test_the_tables_of_networks_are_of_the_kept_runs(kept: bool, processor: str) -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    by_glibc = [f"by_glibc/networks_{which}" for which in ("x05_224", "resnet18_224", "32")]
    found = networks(processor, NETWORKS[processor] if kept else by_glibc)
    assert len(found) == (30 if kept else 4)
    for (network, size, job), result in found.items():
        row = f"{network}, {size} px | {job}" if kept else f"{network}, {size} px, by glibc"
        times = result["milliseconds"]
        static, best = times["static"], min(times[name] for name in times.keys() - {"static", "timm"})
        shown = ("grouped", "matmul", "mixture", "chunked", "cpp", "timm", "auto")
        columns = [f"{times[name] / static:.2f}" for name in shown]
        ratios = " | ".join([*columns, f"{times['auto'] / best:.2f}"])
        assert f"| {row} | {static:.1f} ms | {ratios} |" in log


@pytest.mark.parametrize(("processor", "prefix"), [("intel", "Intel's, "), ("other", "")])
def test_the_table_of_single_layers_is_of_the_kept_runs(
    processor: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {run: [*map(str, kept_runs(processor, names))] for run, names in FITTED_TO.items()}
    runs = {f"{prefix}{run}": paths for run, paths in kept.items() if paths}
    fit_costs.main([path for paths in runs.values() for path in paths])
    if kept["K = 4, another run"]:
        runs[f"{prefix}K = 4, together"] = ["K = 4, 2 runs together"]
    for run, names in NOT_FITTED_TO.items():
        paths = [*map(str, kept_runs(processor, names))]
        assert paths, f"there is no run of {processor}, {run}"
        runs[f"{prefix}{run}"] = paths
        for path in paths:
            fit_costs.report(path, fit_costs.cases(path))
    said = capsys.readouterr().out.splitlines()
    log = (ROOT / "experiments/LOG.md").read_text()
    for run, job in itertools.product(runs, layers.JOBS):
        starts = tuple(f"{title}, {job}, " for title in runs[run])
        (line,) = (one for one in said if one.startswith(starts))
        found = re.search(r"on (.*)% of 202 .* most (.*) times it; (.*) times as .* on (.*) shapes more", line)
        assert found is not None
        near, most, faster, slower = found.groups()
        batch = "" if job == "forward of one" else ", batch 32"
        assert f"| {run}, {job}{batch} | {near} % | {most} | {faster} | {slower} |" in log


@pytest.mark.parametrize("processor", ["intel", "other"])
def test_the_table_of_growth_is_of_the_kept_run(processor: str) -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    results = json.loads((RESULTS / processor / "growth.json").read_text())["results"]["growth"]
    assert [row["batch"] for row in results] == [*growth.BATCHES]
    for row in results:
        static, *times = row["milliseconds"].values()
        ratios = " | ".join(f"{time / static:.2f}" for time in times)
        assert f"| {row['batch']} | {static:.1f} | {ratios} |" in log
    line, errors, *_ = explained(results).splitlines()
    assert line.rsplit(" + ", 1)[0] in " ".join(log.split())  # an image's time is in milliseconds there
    median, most = re.findall(r"(\d+)%", errors)
    assert f"(median {median} %, most {most} %)" in log


@pytest.mark.parametrize("processor", ["intel", "other"])
def test_the_table_of_modes_is_of_the_kept_run(processor: str) -> None:
    log = (ROOT / "experiments/LOG.md").read_text()
    rows = json.loads((RESULTS / processor / "modes.json").read_text())["results"]["modes"]
    for dynamic, static in zip(rows[::2], rows[1::2], strict=True):
        what, same = (
            ", ".join(map(str, row["shape"])) if "shape" in row else f"{row['network']}, {row['size']} px"
            for row in (dynamic, static)
        )
        assert what == same
        plain, beside = (row["milliseconds"]["plain"] for row in (dynamic, static))
        ratios = [f"{ratio:.2f} ({static['ratios'][mode]:.2f})" for mode, ratio in dynamic["ratios"].items()]
        assert f"| {what} | {plain:.1f} ({beside:.1f}) | {' | '.join(ratios)} |" in log


def test_the_readme_says_what_the_modes_took() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows = json.loads((RESULTS / "other/modes.json").read_text())["results"]["modes"]
    layers, networks = ([row for row in rows if kind in row] for kind in ("shape", "network"))

    def reach(kind: str, mode: str) -> str:
        ratios = [row["ratios"][mode] for row in layers if row["layer"] == kind]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    def each(kind: str, mode: str) -> str:
        first, second, third = (f"{row['ratios'][mode]:.2f}" for row in networks if row["layers"] == kind)
        return f"{first}, {second} and {third}"

    compiled = [row["milliseconds"]["compiled"] for row in networks]
    beside = [f"{dynamic / static:.2f}" for dynamic, static in zip(compiled[::2], compiled[1::2], strict=True)]
    modes = [reach("dynamic", mode) for mode in ("compiled", "bfloat16", "channels_last", "again")]
    for text in (
        f"in {modes[0]} (`nn.Conv2d` {reach('static', 'compiled')}), {modes[1]} and {modes[2]} of the time of six",
        f"measured again took {modes[3]}.",
        f"take {each('dynamic', 'compiled')} of their time (with static convolutions {each('static', 'compiled')})",
        f"{beside[0]}, {beside[1]} and {beside[2]} times that of the compiled static networks",
        f"these take {each('static', 'channels_last')} of their time, dynamic ones {each('dynamic', 'channels_last')}.",
    ):
        assert text in readme


def test_shapes_are_those_of_the_networks() -> None:
    found = layers.shapes()
    assert found[64, 64, 3, 1, 1, 1, 56] == ["ResNet-18, 224 px", "ResNet-50, 224 px"]
    assert found[160, 960, 1, 1, 0, 1, 1] == ["MobileNetV2, 32 px"]


@pytest.mark.slow
def test_growth_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "NETWORK", "MobileNetV2 x0.5")
    monkeypatch.setattr(growth, "KERNELS", (1, 2, 3))
    monkeypatch.setattr(growth, "BATCHES", (2,))
    main(["growth", "--rounds", "1"])
    said = capsys.readouterr().out
    (row,) = json.loads(said.splitlines()[-1])["results"]["growth"]
    assert set(row["milliseconds"]) == set(row["work"]) == {"static", "K = 1", "K = 2", "K = 3"}
    assert "batch 2, K = 3: weights " in said


def test_modes_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    monkeypatch.setattr(modes, "SHAPES", [(4, 8, 3, 1, 1, 1, 4)])
    monkeypatch.setattr(modes, "WHOLE", [])
    main(["modes", "--rounds", "1", "--batch", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["modes"]
    assert [row["layer"] for row in rows] == ["dynamic", "static"]
    for row in rows:
        assert set(row["milliseconds"]) == {"plain", "again", "channels_last", "bfloat16", "compiled"}
        assert row["ratios"].keys() == row["milliseconds"].keys() - {"plain"}


@pytest.mark.slow
def test_modes_of_networks_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    monkeypatch.setattr(modes, "SHAPES", [])
    monkeypatch.setattr(modes, "WHOLE", [("ResNet-18", 32)])
    main(["modes", "--rounds", "1", "--batch", "2", "--kernels", "2"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["modes"]
    assert [(row["network"], row["size"], row["layers"]) for row in rows] == [
        ("ResNet-18", 32, "dynamic"),
        ("ResNet-18", 32, "static"),
    ]
    for row in rows:
        assert set(row["milliseconds"]) == set(row["spread"]) == set(modes.MODES)
        assert row["ratios"].keys() == row["milliseconds"].keys() - {"plain"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_is_compiled(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(device=torch.device("cpu"), dtype=torch.float32, channels_last=False, compiled=compiled)
    compile, counter = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=counter))
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    make_step(model, 2, True, 5, options)()
    assert counter.frame_count == compiled


def test_a_ratio_is_of_the_times_in_the_same_round() -> None:
    assert modes.ratio([1.0, 3.0, 9.0], [2.0, 9.0, 3.0]) == 0.5  # of the medians: 1


def test_draws_every_part(tmp_path: Path) -> None:
    times = {"static": 1.0, "grouped": 2.0, "matmul": 4.0, "mixture": 8.0, "chunked": 16.0, "timm": 4.0, "auto": 2.0}
    shapes = ((4, 6, 1, 1, 0, 1, 7), (4, 4, 3, 1, 1, 4, 7), (4, 6, 3, 1, 1, 1, 7))
    results = {
        "layers": [
            {"job": "forward", "batch": 32, "shape": shape, "auto": "grouped", "milliseconds": times}
            for shape in shapes
        ],
        "networks": [{"job": "forward", "batch": 32, "network": "N", "size": 32, "milliseconds": times}],
        "growth": [{"batch": b, "milliseconds": {"static": 1.0, "K = 1": 2.0, "K = 2": 3.0}} for b in range(1, 6)],
        "modes": [],
    }
    run = {"device": "a CPU", "torch": "2", "date": "today", "kernels": 4, "dtype": "float32", "channels_last": False}
    paths = draw({**run, "results": results}, tmp_path / "new")
    assert [path.name for path in paths] == ["layers.png", "networks.png", "growth.png"]
    assert all(path.stat().st_size > 5000 for path in paths)

    files = []
    for part in ("networks", "growth"):
        files.append(str(tmp_path / f"{part}.json"))
        Path(files[-1]).write_text(json.dumps({**run, "results": {part: results[part]}}))
    plots.main(str(tmp_path / "together"), *files)
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["growth.png", "networks.png"]


@pytest.mark.parametrize(("name", "part"), [("networks_32", "networks"), ("growth", "growth"), ("layers", "layers")])
def test_what_came_out_does_not_say_what_was_measured(name: str, part: str) -> None:
    (row, *_) = json.loads((RESULTS / f"intel/{name}.json").read_text())["results"][part]
    said = json.loads(plots._what(row))
    assert said.keys() <= {"network", "size", "shape", "networks", "kernel", "job", "batch", "training"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lairs"], "parts ['lairs'] do not exist, choose of ['layers', 'networks', 'growth', 'modes']"),
        (["--rounds", "0"], "argument --rounds: 0 must be at least 1"),
        (["--device", "gpu"], "argument --device: "),
        (["--device", "meta"], "'meta' is not here, or cannot be timed: choose cpu or cuda"),
        (["--networks", "LeNet"], "invalid choice: 'LeNet'"),
    ],
)
def test_bad_options(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_is_measured_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--networks", "MobileNetV2 x0.5", "--sizes", "32", "--batch", "2", "--rounds", "2"]
    main(["networks", *options, "--out", str(tmp_path)])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads((tmp_path / "dynamic_conv.json").read_text())
    assert [row["job"] for row in printed["results"]["networks"]] == ["training step", "forward", "forward of one"]
    for row in printed["results"]["networks"]:
        assert list(row["milliseconds"]) == ["static", "grouped", "matmul", "mixture", "chunked", "cpp", "timm", "auto"]
        assert min(*row["milliseconds"].values(), *row["MiB"].values()) > 0
        for name, (steps, lower, upper) in row["spread"].items():
            assert steps >= 2 * LEAST_STEPS
            assert steps % 2 == 0  # as many in each turn
            assert 0 < lower <= row["milliseconds"][name] <= upper
    assert (tmp_path / "networks.png").stat().st_size > 5000
