import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.testing import assert_allclose
from torch import Tensor

from dyn_lightning.analysis import figures
from dyn_lightning.analysis.statistics import LayerStatistics, layer_statistics

NAN = math.nan


def layer(load: Sequence[float] = (0.5, 0.5), **known: Any) -> LayerStatistics:
    """Statistics of one layer; what is not given is not known."""
    unknown = dict.fromkeys(("entropy", "relative_entropy", "largest", "balance", "explained"), NAN)
    shape = {"load": torch.tensor(load, dtype=torch.float64), "class_means": torch.zeros(0, len(load))}
    return LayerStatistics(**{"images": 7, "not_finite": 0, "dead": []} | unknown | shape | known)


def of_classes(means: Tensor | Sequence[Sequence[float]]) -> LayerStatistics:
    means = torch.as_tensor(means, dtype=torch.float64)
    return layer([1 / means.shape[1]] * means.shape[1], class_means=means)


def cells(axes: Axes) -> np.ndarray:
    (image,) = axes.images
    return np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), NAN)


def mesh(axes: Axes) -> np.ndarray:
    (found,) = axes.collections
    return np.ma.filled(np.ma.asarray(found.get_array(), dtype=float), NAN)


def ticks(axis: Axis) -> list[str]:
    """The labels that are in sight."""
    low, high = sorted(axis.get_view_interval())
    places = axis.get_ticklocs()
    return [text.get_text() for text, place in zip(axis.get_ticklabels(), places, strict=True) if low <= place <= high]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


class TestDepth:
    def test_by_hand(self) -> None:
        layers = {
            "a": layer([0.25, 0.75], relative_entropy=0.8, explained=0.1),
            "b": layer([0.0, 0.6, 0.4], relative_entropy=0.5, explained=0.3, dead=[0]),
            "c": layer([0.02, 0.3, 0.06, 0.02, 0.6], relative_entropy=0.1, explained=0.9, dead=[3, 0]),
        }
        entropy, explained, load, bar = figures.depth(layers).axes
        assert entropy.get_title() == "Routing against depth"
        assert entropy.get_ylabel().startswith("entropy / log2 K")
        assert entropy.lines[0].get_ydata().tolist() == [0.8, 0.5, 0.1]
        assert "between classes" in explained.get_ylabel()
        assert explained.lines[0].get_ydata().tolist() == [0.1, 0.3, 0.9]
        assert texts(entropy) == texts(explained) == []
        shares = [[0.5, 0.0, 0.1], [1.5, 1.8, 1.5], [NAN, 1.2, 0.3], [NAN, NAN, 0.1], [NAN, NAN, 3.0]]
        assert_allclose(cells(load), shares, rtol=1e-6)
        crosses = [point for line in load.lines for point in zip(*line.get_data(), strict=True)]
        assert crosses == [(1, 0), (2, 3), (2, 0)]
        assert {line.get_marker() for line in load.lines} == {"x"}
        assert load.images[0].get_clim() == pytest.approx((-1, 3))  # an equal share is in the middle
        assert bar.get_ylim() == pytest.approx((0, 3))
        assert "x: dead" in bar.get_ylabel()
        assert load.get_ylabel() == "kernel"
        assert ticks(load.xaxis) == ["a", "b", "c"]
        assert ticks(load.yaxis) == ["0", "1", "2", "3", "4"]

    def test_without_labels(self) -> None:
        layers = {"a": layer(relative_entropy=0.8), "b": layer(relative_entropy=0.5)}
        entropy, explained, *_ = figures.depth(layers).axes
        assert texts(explained) == ["nothing to measure"]
        assert texts(entropy) == []

    def test_some_are_not_known(self) -> None:
        """As the entropy of a layer with one kernel, or what classes explain of one that never varies."""
        known = layer(relative_entropy=0.5, explained=0.2)
        entropy, explained, load, _ = figures.depth({"a": layer([1.0]), "b": known, "c": layer([NAN] * 3)}).axes
        assert_allclose(entropy.lines[0].get_ydata(), [NAN, 0.5, NAN])
        assert_allclose(explained.lines[0].get_ydata(), [NAN, 0.2, NAN])
        assert texts(entropy) == texts(explained) == []
        assert_allclose(cells(load), [[1, 1, NAN], [NAN, 1, NAN], [NAN, NAN, NAN]])

    @pytest.mark.parametrize(
        ("weights", "empty"),
        [
            pytest.param(torch.ones(6, 1), [True, True], id="one kernel"),
            pytest.param(torch.full((6, 2), 0.5), [False, True], id="nothing varies"),
        ],
    )
    def test_nothing_to_measure(self, weights: Tensor, empty: list[bool]) -> None:
        figure = figures.depth({"a": layer_statistics(weights, torch.tensor([0, 1, 2, 3, 3, 3]), 4)})
        assert [texts(axes) == ["nothing to measure"] for axes in figure.axes[:2]] == empty

    @pytest.mark.parametrize("kernels", [1, 2, 3])
    def test_kernels_have_whole_numbers(self, kernels: int) -> None:
        load = figures.depth({"a": layer([1 / kernels] * kernels, relative_entropy=0.5)}).axes[2]
        assert ticks(load.yaxis) == [str(kernel) for kernel in range(kernels)]

    def test_many_kernels(self) -> None:
        load = figures.depth({"a": layer([0.5, 0.5]), "b": layer([1 / 70] * 70, dead=[3, 63, 64, 69])}).axes[2]
        assert_allclose(cells(load), [[1, 1]] * 2 + [[NAN, 1]] * 62)
        assert load.get_ylabel() == "kernel, 64 of 70"
        assert [point for line in load.lines for point in zip(*line.get_data(), strict=True)] == [(1, 3), (1, 63)]


def depth_axis(names: list[str]) -> Axis:
    return figures.depth(dict.fromkeys(names, layer())).axes[2].xaxis


def similarity_axis(names: list[str]) -> Axis:
    return figures.similarity(torch.eye(len(names)), names).axes[0].yaxis


def groups_at_end_axis(names: list[str]) -> Axis:
    return figures.group_counts({name: [2] for name in names}, [7], dict.fromkeys(names, 8)).axes[0].yaxis


def groups_axis(names: list[str]) -> Axis:
    return figures.group_counts({name: [2, 4, 2] for name in names}, [0, 1, 2], dict.fromkeys(names, 8)).axes[0].yaxis


@pytest.mark.parametrize("axis", [depth_axis, similarity_axis, groups_at_end_axis, groups_axis])
class TestNamesOfLayers:
    @pytest.mark.parametrize(("count", "every"), [(1, 1), (40, 1), (41, 2), (81, 3)])
    def test_some_are_named(self, axis: Callable[[list[str]], Axis], count: int, every: int) -> None:
        names = [f"conv{number}" for number in range(count)]
        found = axis(names)
        assert ticks(found) == names[::every]
        assert list(found.get_ticklocs()) == list(range(0, count, every))
        some = f", one of {every} is named" if every > 1 else ""
        assert found.get_label_text() == f"layer\nfrom input to output{some}"

    @pytest.mark.parametrize(
        ("names", "prefix", "short"),
        [
            (
                ["net.body.0.conv", "net.body.1.conv", "net.body.2.a.conv"],
                " of net.body",
                ["0.conv", "1.conv", "2.a.conv"],
            ),
            (["net.body.0", "net.body1.0"], " of net", ["body.0", "body1.0"]),
            (["net.conv", "net.conv.0"], " of net", ["conv", "conv.0"]),
            (["a.conv", "b.conv"], "", ["a.conv", "b.conv"]),
            (["net.body.conv"], "", ["net.body.conv"]),
            (["", "conv"], "", ["", "conv"]),
            (
                ["twenty_eight_characters.body.a", "twenty_eight_characters.body.b"],
                " of twenty_eight_characters.body",
                ["a", "b"],
            ),
        ],
    )
    def test_what_they_have_in_common(
        self, axis: Callable[[list[str]], Axis], names: list[str], prefix: str, short: list[str]
    ) -> None:
        found = axis(names)
        assert ticks(found) == short
        assert found.get_label_text() == f"layer{prefix}\nfrom input to output"

    def test_long_ones_are_shortened(self, axis: Callable[[list[str]], Axis]) -> None:
        names = ["twenty_characters.abc", "net.twenty_characters", "net.twenty_one_characters.1"]
        assert ticks(axis(names)) == ["...ty_characters.abc", "...twenty_characters", "..._one_characters.1"]

    def test_those_that_would_be_alike_are_numbered(self, axis: Callable[[list[str]], Axis]) -> None:
        names = ["a", *(f"stage{number}.a_long_name_of_a_block.conv" for number in range(1, 41))]
        assert ticks(axis(names)) == ["0 a", *(f"{number} ...e_of_a_block.conv" for number in range(2, 41, 2))]

    def test_long_prefixes_are_shortened(self, axis: Callable[[list[str]], Axis]) -> None:
        names = [f"a_network.inside_of_another.inside_of_one_more.{number}" for number in (1, 2)]
        assert axis(names).get_label_text().startswith("layer of ...nother.inside_of_one_more\n")


class TestClasses:
    LAYERS = (
        [[0.9, 0.1], [0.2, 0.8], [NAN, NAN], [0.5, 0.5]],
        [[0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [NAN, NAN, NAN], [0.6, 0.4, 0.0]],
        [[0.2] * 5, [0.1, 0.1, 0.2, 0.2, 0.4], [NAN] * 5, [0.3, 0.1, 0.3, 0.1, 0.2]],
    )

    def test_by_hand(self) -> None:
        layers = {f"net.{name}": of_classes(means) for name, means in zip("abc", self.LAYERS, strict=True)}
        figure = figures.classes(layers, ["cat", "dog", "cow", "an animal with a long name"])
        axes, bar = figure.axes
        assert_allclose(mesh(axes), np.concatenate(self.LAYERS, axis=1), rtol=1e-6)
        assert axes.get_title() == "Mean routing weights by class"
        assert ticks(axes.yaxis) == ["cat", "dog", "cow", "an animal with a long..."]
        assert ticks(axes.xaxis) == ["a", "b", "c"]
        assert list(axes.get_xticks()) == [0.5, 1.5, 2.5]
        assert [line.get_xdata() for line in axes.lines] == [[1, 1], [2, 2]]
        edges = [0, 1 / 2, 1, 4 / 3, 5 / 3, 2, 2.2, 2.4, 2.6, 2.8, 3]  # each layer has the same room
        assert_allclose(axes.collections[0].get_coordinates()[0, :, 0], edges)
        assert axes.get_ylim() == (3.5, -0.5)  # the first class is on top
        assert axes.get_xlabel() == "layer of net, and in each its kernels"
        assert axes.collections[0].get_clim() == pytest.approx((0, 0.9))
        assert bar.get_ylabel() == "mean routing weight"

    def test_without_names(self) -> None:
        (axes, _) = figures.classes({"net.a": of_classes([[1.0], [0.25], [0.5]])}).axes
        assert ticks(axes.yaxis) == ["0", "1", "2"]
        assert ticks(axes.xaxis) == ["net.a"]
        assert axes.get_xlabel() == "layer, and in each its kernels"
        assert_allclose(mesh(axes), [[1.0], [0.25], [0.5]])
        assert axes.collections[0].get_coordinates()[0, :, 0].tolist() == [0, 1]

    def test_fewer_names_than_classes(self) -> None:
        (axes, _) = figures.classes({"a": of_classes([[1.0], [0.25], [0.5]])}, ["cat"]).axes
        assert ticks(axes.yaxis) == ["cat", "1", "2"]

    @pytest.mark.parametrize(
        ("means", "limits"),
        [
            ([[-0.5, 0.25], [0.25, -0.75]], (-0.75, 0.25)),
            ([[-0.5, -0.25], [-0.75, -1.0]], (-1, -0.25)),
            ([[NAN, NAN], [0.5, 0.25]], (0, 0.5)),
        ],
    )
    def test_colours(self, means: list[list[float]], limits: tuple[float, float]) -> None:
        (axes, _) = figures.classes({"a": of_classes(means)}).axes
        assert axes.collections[0].get_clim() == pytest.approx(limits)

    @pytest.mark.parametrize("mean", [NAN, 0.0])
    def test_nothing_to_tell_apart(self, mean: float) -> None:
        figure = figures.classes({"a": of_classes([[mean] * 2] * 3)})
        figures.pixels(figure)
        assert_allclose(mesh(figure.axes[0]), [[mean] * 2] * 3)

    def test_those_that_differ_most(self) -> None:
        """Of 34 classes, 5 are all but alike in layer a and 12 has no images, but 17 has another mean in layer b."""
        a, b = [[10.0, -10.0] if kind % 2 else [-10.0, 10.0] for kind in range(34)], [[0.0] * 3 for _ in range(34)]
        for kind in (4, 9, 17, 23, 31):
            a[kind] = [kind / 100, 0.0]
        a[12], b[12] = [NAN] * 2, [NAN] * 3
        b[17], b[4] = [0.0, 9.0, 0.0], [0.0, 0.0, -9.0]
        (axes, _) = figures.classes(
            {"a": of_classes(a), "b": of_classes(b)}, [f"kind {kind}" for kind in range(34)]
        ).axes
        kept = [kind for kind in range(34) if kind not in (9, 12, 23, 31)]
        assert ticks(axes.yaxis) == [f"kind {kind}" for kind in kept]
        assert_allclose(mesh(axes), [a[kind] + b[kind] for kind in kept], rtol=1e-6)
        assert axes.get_title() == "Mean routing weights by class\nthe 30 of 34 classes that differ most"

    def test_thirty_are_all_shown(self) -> None:
        (axes, _) = figures.classes({"a": of_classes([[1.0, 2.0]] * 30)}).axes
        assert len(ticks(axes.yaxis)) == 30
        assert axes.get_title() == "Mean routing weights by class"

    def test_many_kernels(self) -> None:
        means = torch.rand(4, 70)
        (axes, _) = figures.classes({"net.a": of_classes([[0.1, 0.2, 0.3]] * 4), "net.b": of_classes(means)}).axes
        assert ticks(axes.xaxis) == ["a", "b\n64 of 70 kernels"]
        assert_allclose(mesh(axes)[:, 3:], means[:, :64], rtol=1e-6)
        assert_allclose(axes.collections[0].get_coordinates()[0, 3:, 0], np.linspace(1, 2, 65))

    def test_layers_from_all_depths(self) -> None:
        layers = {f"net.{number}": of_classes([[number, 0.5]] * 3) for number in range(12)}
        (axes, _) = figures.classes(layers).axes
        assert ticks(axes.xaxis) == ["0", "2", "4", "7", "9", "11"]
        assert mesh(axes)[1, ::2].tolist() == [0, 2, 4, 7, 9, 11]
        assert axes.get_title() == "Mean routing weights by class in 6 of 12 layers"

    def test_long_names_of_layers(self) -> None:
        names = [f"a_network.inside_of_another.inside_of_one_more.{end}.a_long_name_of_a_block" for end in "ab"]
        (axes, _) = figures.classes(dict.fromkeys(names, of_classes([[1.0]] * 2))).axes
        assert ticks(axes.xaxis) == ["0 ...g_name_of_a_block", "1 ...g_name_of_a_block"]
        assert axes.get_xlabel() == "layer of ...nother.inside_of_one_more, and in each its kernels"

    def test_numbers_are_those_of_all_layers(self) -> None:
        """As in the other figures, or one number would stand for two layers."""
        names = [f"net.{number}.a_long_name_of_a_block" for number in range(12)]
        (axes, _) = figures.classes(dict.fromkeys(names, of_classes([[1.0]] * 2))).axes
        assert [text.split()[0] for text in ticks(axes.xaxis)] == ["0", "2", "4", "7", "9", "11"]


def test_similarity() -> None:
    matrix = torch.tensor([[1, 0.25, NAN], [0.25, 1, NAN], [NAN, NAN, NAN]], dtype=torch.float64)
    axes, bar = figures.similarity(matrix, ["net.a", "net.b", "net.c"]).axes
    assert_allclose(cells(axes), matrix)
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.get_xlabel() == "the same layers"
    assert ticks(axes.xaxis) == []
    assert bar.get_ylabel() == "linear CKA"


def pictures(*shape: int) -> Tensor:
    """None of them has white pixels."""
    return torch.randint(200, shape, dtype=torch.uint8)


class TestExamples:
    def test_by_hand(self) -> None:
        """Three kernels, two images of 5 x 5 pixels: 3 rows for the text and 2 columns are between them."""
        images, shares = pictures(3, 2, 3, 5, 5), torch.tensor([[0.9, 0.8], [0.75, NAN], [0.5, 0.251]])
        labels = torch.tensor([[1, 0], [-1, 1], [0, 2]])
        figure = figures.examples("net.conv", images, shares, labels, ["cat", "animal of the night"])
        (axes,) = figure.axes
        canvas = axes.images[0].get_array()
        assert canvas.shape == (3 * 8, 2 * 7, 3)
        for row, column in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
            part = canvas[8 * row : 8 * row + 5, 7 * column : 7 * column + 5]
            assert np.array_equal(part, images[row, column].permute(1, 2, 0))
        assert (canvas.min(2) < 255).sum() == 5 * 5 * 5  # the rest is white, also where the share is NaN
        assert texts(axes) == ["animal ...\n0.90", "cat\n0.80", "0.75", "cat\n0.50", "2\n0.25"]
        places = [(2.5, 5), (9.5, 5), (2.5, 13), (2.5, 21), (9.5, 21)]
        assert [text.get_position() for text in axes.texts] == places
        assert self.title(figure) == "net.conv\nclass and the kernel's share of the weights"
        assert axes.get_ylabel() == "kernel"
        assert ticks(axes.yaxis) == ["0", "1", "2"]
        assert list(axes.get_yticks()) == [2.5, 10.5, 18.5]

    def title(self, figure: Figure) -> str:
        (text,) = figure.texts
        return text.get_text()

    def test_without_names(self) -> None:
        labels = torch.tensor([[999, -1, 0]])
        (axes,) = figures.examples("a", pictures(1, 3, 3, 8, 8), torch.tensor([[0.5, 0.25, 0.125]]), labels).axes
        assert texts(axes) == ["999\n0.50", "0.25", "0\n0.12"]

    def test_nothing_is_known(self) -> None:
        (axes,) = figures.examples("a", pictures(2, 3, 3, 8, 8), torch.full((2, 3), NAN), -torch.ones(2, 3)).axes
        assert (axes.images[0].get_array() == 255).all()
        assert texts(axes) == []

    @pytest.mark.parametrize(("kernels", "said"), [(16, ""), (17, "\n16 of 17 kernels"), (64, "\n16 of 64 kernels")])
    def test_many_kernels(self, kernels: int, said: str) -> None:
        images = pictures(kernels, 1, 3, 5, 5)
        figure = figures.examples("a", images, torch.rand(kernels, 1), torch.zeros(kernels, 1))
        (axes,) = figure.axes
        assert self.title(figure).startswith(f"a{said}\nclass")
        assert ticks(axes.yaxis) == [str(kernel) for kernel in range(16)]
        assert len(axes.texts) == 16
        assert np.array_equal(axes.images[0].get_array()[15 * 8 : 15 * 8 + 5, :5], images[15, 0].permute(1, 2, 0))

    def test_long_title(self) -> None:
        figure = figures.examples("0123456789." * 5, pictures(1, 1, 3, 8, 8), torch.ones(1, 1), torch.ones(1, 1))
        assert self.title(figure).startswith(f"...{('0123456789.' * 5)[-29:]}\nclass")

    @pytest.mark.parametrize("side", [28, 48])
    @pytest.mark.parametrize(("kernels", "count"), [(1, 1), (2, 24), (17, 1)])
    def test_texts_are_outside_of_the_images(self, kernels: int, count: int, side: int) -> None:
        images, shape = pictures(kernels, count, 3, side, side), (kernels, count)
        figure = figures.examples("a", images, torch.rand(shape), torch.zeros(shape), ["a class"])
        figures.pixels(figure)
        (axes,), (title,) = figure.axes, figure.texts
        box, canvas = axes.get_window_extent(), axes.images[0].get_array()
        assert title.get_window_extent().y0 >= box.y1
        assert box.width / box.height == pytest.approx(canvas.shape[1] / canvas.shape[0])  # pixels are square
        cell = len(canvas) // min(16, kernels)
        for number, text in enumerate(axes.texts):
            lowest, highest = text.get_window_extent().transformed(axes.transData.inverted()).intervaly  # y goes down
            row = number // count
            assert row * cell + side - 0.5 <= highest < lowest <= (row + 1) * cell - 0.5


MOST = {"net.a": 4, "net.b": 16, "net.c": 9}


class TestGroupCounts:
    def bars(self, axes: Axes) -> list[list[tuple[float, float]]]:
        """Widths and middles, those of all that are possible first."""
        return [
            [(bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in container]
            for container in axes.containers
        ]

    def test_one_epoch(self) -> None:
        figure = figures.group_counts({"net.a": [2], "net.b": [8], "net.c": [3]}, [7], MOST)
        (axes,) = figure.axes
        assert self.bars(axes) == [[(4, 0), (16, 1), (9, 2)], [(2, 0), (8, 1), (3, 2)]]
        assert axes.get_title() == "Groups"
        assert axes.get_xscale() == "log"
        assert axes.get_ylim() == (2.5, -0.5)  # the first layer is on top
        assert [text.get_text() for text in figure.legends[0].texts] == ["as many as are possible", "groups"]

    def test_several_epochs(self) -> None:
        history = {"net.c": [1, 1, 9, 3], "net.b": [1, 4, 4, 8], "net.a": [1, 2, 2, 4]}
        over_time, at_end, bar = figures.group_counts(history, [0, 1, 5, 20], MOST).axes
        (mesh,) = over_time.collections
        assert mesh.get_array().tolist() == list(history.values())
        assert mesh.get_coordinates()[0, :, 0].tolist() == [-0.5, 0.5, 3, 12.5, 20.5]
        assert mesh.get_coordinates()[:, 0, 1].tolist() == [-0.5, 0.5, 1.5, 2.5]
        assert over_time.get_ylim() == (2.5, -0.5)
        assert (over_time.get_title(), over_time.get_xlabel()) == ("Groups over training", "epoch")
        assert self.bars(at_end) == [[(9, 0), (16, 1), (4, 2)], [(3, 0), (8, 1), (4, 2)]]
        assert at_end.get_title() == "Groups after epoch 20"
        assert ticks(bar.yaxis) == ["1", "2", "4", "8", "16"]

    def test_a_power_of_two_a_colour(self) -> None:
        counts = [1, 2, 4, 8, 16, 32]
        (mesh,) = figures.group_counts({"a": counts}, range(6), {"a": 32}).axes[0].collections
        assert len(np.unique(mesh.to_rgba(np.array(counts)), axis=0)) == 6
        near, power = mesh.to_rgba(np.array([3, 5, 11, 12])), mesh.to_rgba(np.array([4, 4, 8, 16]))
        assert_allclose(near, power)

    @pytest.mark.parametrize("epochs", [1, 2])
    @pytest.mark.parametrize("history", [{"a": 0}, {"a": 0, "b": 0, "c": 1}, {"a": 1}])
    def test_few_groups(self, history: dict[str, int], epochs: int) -> None:
        """None are left where nothing is connected."""
        counts = {name: [count] * epochs for name, count in history.items()}
        figure = figures.group_counts(counts, range(epochs), dict.fromkeys(history, 6))
        figures.pixels(figure)
        assert [width for width, _ in self.bars(figure.axes[epochs - 1])[1]] == list(history.values())
        for bar in figure.axes[2:]:
            assert ticks(bar.yaxis) == ["1", "2"]
            assert ticks(figure.axes[0].xaxis) == ["0", "1"]  # whole epochs


class TestMembership:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
    def test_small(self, dtype: torch.dtype) -> None:
        matrix = torch.block_diag(torch.ones(2, 3), torch.ones(4, 1))
        (axes,) = figures.membership("net.conv", matrix.to(dtype)).axes
        assert cells(axes).tolist() == matrix.tolist()
        (image,) = axes.images
        assert image.to_rgba(np.array([0.0, 1.0])).tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
        assert axes.get_title() == "net.conv\nblack is connected"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("channel of the input", "channel of the output")
        assert tuple(image.get_extent()) == (-0.5, 3.5, 5.5, -0.5)

    @pytest.mark.parametrize(
        ("shape", "steps"),
        [((600, 514), (2, 2)), ((513, 40), (2, 1)), ((7, 1030), (1, 3)), ((1025, 513), (3, 2)), ((512, 512), (1, 1))],
    )
    def test_large(self, shape: tuple[int, int], steps: tuple[int, int]) -> None:
        matrix = torch.randint(2, shape).float().requires_grad_()
        (axes,) = figures.membership("a", matrix).axes
        down, right = (-length % step for length, step in zip(shape, steps, strict=True))
        blocks = np.pad(matrix.detach().numpy(), ((0, down), (0, right)), constant_values=NAN)
        blocks = blocks.reshape((shape[0] + down) // steps[0], steps[0], (shape[1] + right) // steps[1], steps[1])
        assert_allclose(cells(axes), np.nanmean(blocks, axis=(1, 3)), rtol=1e-6)
        some = f", averaged over {steps[0]}x{steps[1]} channels" if max(steps) > 1 else ""
        assert axes.get_title() == f"a\nblack is connected{some}"
        assert tuple(axes.images[0].get_extent()) == (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_channels_have_whole_numbers(self, size: int) -> None:
        (axes,) = figures.membership("a", torch.eye(size)).axes
        assert ticks(axes.xaxis) == ticks(axes.yaxis) == [str(channel) for channel in range(size)]

    @pytest.mark.parametrize("side", [1, 3, 64, 130, 390, 391, 512])
    def test_each_channel_can_be_seen(self, side: int) -> None:
        """In a board of black and white fields, each has as many pixels."""
        board = (torch.arange(side)[:, None] + torch.arange(side)) % 2
        figure = figures.membership("a", board)
        drawn = figures.pixels(figure)[:, :, 0]
        left, bottom, right, top = figure.axes[0].get_window_extent().extents.round().astype(int)
        inside = drawn[len(drawn) - top : len(drawn) - bottom, left:right]
        each = len(inside) // side
        assert inside.shape == (side * each, side * each)
        centres = inside[each // 2 :: each, each // 2 :: each]
        expected = 255 * (1 - board.numpy())
        where = slice(None) if each >= 6 else slice(2, -2)  # the frame is drawn over the outermost pixels
        assert np.array_equal(centres[where, where], expected[where, where])

    def test_long_name(self) -> None:
        (axes,) = figures.membership("0123456789." * 5, torch.eye(3)).axes
        assert axes.get_title() == f"...{('0123456789.' * 5)[-29:]}\nblack is connected"


class TestPixels:
    def test_shape_and_content(self) -> None:
        figure = Figure(figsize=(3, 2), facecolor="lime", dpi=50)
        drawn = figures.pixels(figure)
        assert (drawn.shape, drawn.dtype) == ((100, 150, 3), np.uint8)
        assert (drawn == [0, 255, 0]).all()

    def test_of_a_real_figure(self) -> None:
        figure = figures.membership("a", torch.eye(3))
        drawn = figures.pixels(figure)
        width, height = (figure.get_size_inches() * figure.dpi).round()
        assert drawn.shape == (height, width, 3)
        assert (drawn.min(), drawn.max()) == (0, 255)


@pytest.mark.parametrize(
    ("items", "count", "expected"),
    [
        ([], 3, []),
        ([5], 6, [5]),
        ([0, 1, 2], 3, [0, 1, 2]),
        (list(range(7)), 6, [0, 1, 2, 4, 5, 6]),
        (list(range(100)), 2, [0, 99]),
        (list(range(11)), 6, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_spread(items: list[int], count: int, expected: list[int]) -> None:
    assert figures.spread(items, count) == expected


def short(count: int) -> list[str]:
    return [f"model.layer{number}.conv" for number in range(count)]


def long(count: int) -> list[str]:
    """They have a long path in common, as networks inside of others have."""
    block = "window_attention_with_memory.pointwise_convolution_of_block"
    return [f"model.backbone.features.stage{number}.{block}" for number in range(count)]


Names = Callable[[int], list[str]]


def depth(count: int, kernels: Sequence[int], names: Names) -> Figure:
    loads = [[1 / kernels[number % len(kernels)]] * kernels[number % len(kernels)] for number in range(count)]
    return figures.depth({name: layer(load) for name, load in zip(names(count), loads, strict=True)})


def classes(count: int, kernels: Sequence[int], kinds: int, names: Names) -> Figure:
    means = [torch.rand(kinds, kernels[number % len(kernels)]) for number in range(count)]
    layers = {name: of_classes(mean) for name, mean in zip(names(count), means, strict=True)}
    return figures.classes(layers, class_names(kinds, names))


def class_names(kinds: int, names: Names) -> list[str]:
    return [
        f"{'a class with a very long name ' * 5}{kind}" if names is long else f"class {kind}" for kind in range(kinds)
    ]


def similarity(count: int, names: Names) -> Figure:
    return figures.similarity(torch.eye(count), names(count))


def examples(kernels: int, images: int, side: int, names: Names) -> Figure:
    labels = torch.arange(kernels * images).reshape(kernels, images) % 10
    shares = torch.rand(kernels, images)
    return figures.examples(
        names(1)[0], pictures(kernels, images, 3, side, side), shares, labels, class_names(10, names)
    )


def group_counts(count: int, epochs: Sequence[int], names: Names) -> Figure:
    history = {name: [2 ** ((number + epoch) % 10) for epoch in epochs] for number, name in enumerate(names(count))}
    return figures.group_counts(history, epochs, dict.fromkeys(history, 512))


def membership(outputs: int, inputs: int, names: Names) -> Figure:
    return figures.membership(names(1)[0], torch.eye(outputs, inputs))


CASES: dict[Callable[..., Figure], list[tuple[Any, ...]]] = {
    depth: [(1, [1]), (3, [100, 2]), (60, [20])],
    classes: [(1, [1], 1), (1, [4], 1000), (2, [4], 31), (3, [100, 2], 4), (60, [100, 2], 1000)],
    similarity: [(2,), (60,)],
    examples: [(1, 1, 8), (1, 24, 48), (16, 1, 32), (20, 8, 16)],
    group_counts: [(1, [7]), (2, [0, 1]), (60, [0]), (60, range(90))],
    membership: [(1, 1), (64, 3), (1100, 40), (1100, 1100)],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """Collect the texts that are drawn: an axis also has labels of ticks that are out of sight."""
    found, draw = [], Text.draw

    def collect(self: Text, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text():
            found.append(self)
        draw(self, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", collect)
    return found


@pytest.mark.parametrize("names", [short, long])
@pytest.mark.parametrize(
    ("draw", "case"),
    [pytest.param(draw, case, id=f"{draw.__name__}{case}") for draw, cases in CASES.items() for case in cases],
)
def test_no_text_is_cut_off(
    draw: Callable[..., Figure], case: tuple[Any, ...], names: Names, drawn: list[Text]
) -> None:
    figure = draw(*case, names)
    figures.pixels(figure)
    assert drawn
    boxes = [(text.get_text(), text.get_window_extent().extents.round().tolist()) for text in drawn]
    width, height = figure.bbox.size.round()
    outside = [(text, box) for text, box in boxes if min(box) < 0 or box[2] > width or box[3] > height]
    assert not outside, f"outside of {width} x {height}"
