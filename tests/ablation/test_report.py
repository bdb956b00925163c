import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dyn_lightning.ablation.harness import Display, run
from dyn_lightning.ablation.launch import Local
from dyn_lightning.ablation.report import write_report
from dyn_lightning.ablation.results import Summary, gather
from dyn_lightning.ablation.study import Cell, Published, Study
from tests.ablation.test_cell import cell

FACTS = {"parameters": 1_234_567, "multiply_adds": 2e6, "devices": 1}


def study(*arms: str, **options: Any) -> Study:
    return Study("What | of *it*?", [], {arm: {} for arm in arms}, baseline=arms[0], seeds=[1, 2, 3], **options)


def cells(folder: Path, **does: list[dict[str, Any]]) -> list:
    """Run trivial cells: of each arm, one a seed, which does what is said."""
    found = []
    for number, (arm, each) in enumerate(does.items()):
        for seed, what in enumerate(each, 1):
            made = Cell(arm, seed, what, FACTS), cell(folder, f"{number}-seed{seed}-abc", **what)
            found.append(made)
    run(found, Local(), Display(found, 1, None))
    return found


def report(folder: Path, given: Study, found: list, left_aside: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    write_report(folder, given, gather(given, found), left_aside)
    return (folder / "report.md").read_text(), json.loads((folder / "results.json").read_text())


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [part.strip() for part in line.strip("|").split("|")]


class TestNumbers:
    def test_by_hand(self, tmp_path: Path) -> None:
        """Means 0.5 and 0.6; differences 0.1, 0.2, 0.0; t of 95 % and two degrees of freedom is 4.303."""
        found = cells(
            tmp_path,
            base=[{"value": value} for value in (0.4, 0.5, 0.6)],
            ours=[{"value": value} for value in (0.5, 0.7, 0.6)],
        )
        text, results = report(tmp_path, study("base", "ours"), found)
        width = 4.302653 * 0.1 / math.sqrt(3)
        low, high = 100 * (0.1 - width), 100 * (0.1 + width)
        assert row(text, "base")[1:5] == ["50.00 ± 10.00", "[25.16, 74.84]", "3", ""]
        assert row(text, "ours")[1:5] == [
            "60.00 ± 10.00",
            "[35.16, 84.84]",
            "3",
            f"+10.00 ± 10.00 [{low:.2f}, {high:.2f}]",
        ]
        assert row(text, "ours")[5:7] == ["1.235", "2.00"]
        assert results["arms"]["ours"]["difference"]["values"] == pytest.approx({"1": 0.1, "2": 0.2, "3": 0.0})

    def test_one_seed_has_no_interval(self) -> None:
        assert Summary.of({1: 0.5}) == Summary({1: 0.5}, 0.5, None, None)
        assert Summary.of({}) == Summary({}, None, None, None)

    def test_pairs_are_of_seeds_that_both_have(self, tmp_path: Path) -> None:
        found = cells(tmp_path, base=[{"value": 0.4}, {"exit": 1}], ours=[{"exit": 1}, {"value": 0.6}])
        text, results = report(tmp_path, study("base", "ours"), found)
        assert results["arms"]["ours"]["difference"]["mean"] is None
        assert row(text, "ours")[1] == "60.00"

    def test_recorded_numbers_that_the_study_shows(self, tmp_path: Path) -> None:
        found = cells(
            tmp_path,
            base=[{}],
            few=[{"metrics": {"groups/a": groups, "groups/b": 1.0, "loss": 2.5}} for groups in (2.0, 4.0)],
            many=[{"metrics": {"groups/a": 16.0, "groups/c": None}}],
        )
        text, results = report(tmp_path, study("base", "few", "many", show=["loss", "groups/*", "nothing*"]), found)
        assert [line for line in text.split("## Recorded numbers")[1].splitlines() if line.startswith("|")] == [
            "|  | few | many |",
            "| --- | --- | --- |",
            "| loss | 2.5, 2.5 |  |",
            "| groups/a | 2, 4 | 16 |",
            "| groups/b | 1, 1 |  |",
            "| groups/c |  |  |",
        ]
        assert results["arms"]["few"]["shown"]["groups/a"] == {"1": 2.0, "2": 4.0}
        assert "- show: no cell has recorded a number 'nothing\\*'" in text

    @pytest.mark.parametrize(("value", "shown"), [(36.0, "36.0"), (69.4, "69.4"), (95.25, "95.25")])
    def test_published_digits_are_shown_as_they_are(self, value: float, shown: str, tmp_path: Path) -> None:
        published = Published("a paper", "read", {"ours": value})
        text, _ = report(tmp_path, study("ours", published=published), cells(tmp_path, ours=[{}]))
        assert shown in row(text, "ours")


class TestText:
    def test_names_that_mean_something_elsewhere(self, tmp_path: Path) -> None:
        """In Markdown, in HTML, and in matplotlib, where a formula that is none would be an error."""
        name = "a|b $\\frac$ *c* <d>"
        found = cells(tmp_path, **{name: [{}]})
        text, _ = report(tmp_path, study(name), found)
        assert text.startswith("# What \\| of \\*it\\*?\n")
        assert "| a\\|b \\$\\\\frac\\$ \\*c\\* \\<d\\> |" in text
        page = (tmp_path / "index.html").read_text()
        assert "a|b $\\frac$ *c* &lt;d&gt;" in page
        assert "<d>" not in page

    def test_says_what_is_missing(self, tmp_path: Path) -> None:
        found = cells(tmp_path, base=[{}], ours=[{"exit": 3}])
        waits = Cell("ours", 2, {}, FACTS), cell(tmp_path, "1-seed2-abc")
        text, results = report(tmp_path, study("base", "ours"), [*found, waits], ("old-seed1-abc",))
        assert [each["status"] for each in results["cells"]] == ["finished", "failed", "unfinished"]
        assert "- not run to the end: ours, seed 2" in text
        assert "- left aside, of an earlier version of the study: old-seed1-abc" in text
        assert "## Failed: ours, seed 1\n\n    fit ended with exit code 3" in text
        assert "1 of 3 finished" in text

    def test_of_nothing(self, tmp_path: Path) -> None:
        waits = Cell("ours", 1, {}, FACTS), cell(tmp_path)
        text, _ = report(tmp_path, study("ours"), [waits])
        assert "0 of 1 finished" in text
        assert not list(tmp_path.glob("*.png"))

    def test_what_cannot_be_compared_is_noted(self, tmp_path: Path) -> None:
        found = cells(tmp_path, ours=[{"value": None}, {"value": 0.5}, {"devices": 2}])
        text, results = report(tmp_path, study("ours"), found)
        assert "- has no test/top1 (NaN, or not recorded), so is in no mean: ours, seed 1" in text
        assert "- the cells were trained on different numbers of devices: [1, 2]" in text
        assert results["arms"]["ours"]["metric"]["values"] == {"2": 0.5, "3": 0.5}

    def test_interruptions_are_noted(self, tmp_path: Path) -> None:
        found = cells(tmp_path, ours=[{}])
        (found[0][1].path / "version_0" / "run-1.json").write_text('{"status": "running"}')
        assert (
            "- went on after an interruption, whose time is not counted: ours, seed 1"
            in report(tmp_path, study("ours"), found)[0]
        )

    def test_plots_of_names_alike_are_two(self, tmp_path: Path) -> None:
        found = cells(tmp_path, **{"x0.5": [{}], "x0 5": [{}]})
        results = gather(study("x0.5", "x0 5"), found)
        top1 = asdict(Summary.of({1: 0.5}))
        conditions = {"attention": {"top1": top1, "deviation_of_draws": None}}
        results["conditions"] = {arm: conditions for arm in ("x0.5", "x0 5")}
        write_report(tmp_path, study("x0.5", "x0 5"), results)
        assert len(list(tmp_path.glob("*.png"))) == 3
