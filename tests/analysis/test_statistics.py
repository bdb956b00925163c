import math

import pytest
import torch
from torch import Tensor

from dyn_lightning.analysis.statistics import entropy, layer_statistics, shares, similarity

NAN, INF = math.nan, math.inf


def routing(images: int = 60, kernels: int = 3) -> Tensor:
    return torch.softmax(2 * torch.randn(images, kernels, dtype=torch.float64), 1)


class TestOfOneLayer:
    def test_by_hand(self) -> None:
        """Four images: one spread evenly, one on kernel 0, two half on kernel 0 and half on kernel 1."""
        weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])
        found = layer_statistics(weights, torch.tensor([0, 2, 1, 1]), 4)
        assert found.images == 4
        assert found.not_finite == 0
        assert found.entropy == pytest.approx((2 + 0 + 1 + 1) / 4)
        assert found.relative_entropy == pytest.approx(0.5)
        assert found.largest == pytest.approx((0.25 + 1 + 0.5 + 0.5) / 4)
        assert found.load.tolist() == pytest.approx([2.25 / 4, 1.25 / 4, 0.0625, 0.0625])
        load = found.load
        assert found.balance == pytest.approx(2 ** -(load * load.log2()).sum().item() / 4)
        assert found.dead == []
        assert found.class_means[:3].tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
        assert found.class_means[3].isnan().all()
        assert found.explained == pytest.approx(1)  # the images of a class are alike

    def test_classes_against_loops(self) -> None:
        labels = torch.randint(5, (60,))
        weights = routing() + torch.randn(5, routing().shape[1])[labels]
        found = layer_statistics(weights, labels, 5)
        center, within, total = weights.mean(0), 0.0, 0.0
        for row, label in zip(weights, labels, strict=True):
            mean = weights[labels == label].mean(0)
            assert found.class_means[label].tolist() == pytest.approx(mean.tolist())
            within += (row - mean).square().sum().item()
            total += (row - center).square().sum().item()
        assert found.explained == pytest.approx(1 - (within / (60 - 5)) / (total / (60 - 1)))
        assert 0 < found.explained < 1

    @pytest.mark.parametrize("classes", [2, 50])
    def test_classes_by_chance_explain_nothing(self, classes: int) -> None:
        """Without the correction, 50 random classes of 200 images would explain a quarter."""
        found = [layer_statistics(torch.rand(200, 3), torch.randint(classes, (200,)), classes) for _ in range(20)]
        assert sum(each.explained for each in found) / 20 < 0.03

    def test_images_without_a_class_are_left_out_of_the_classes_alone(self) -> None:
        weights, labels = torch.rand(9, 3), torch.tensor([0, 1, -1, 0, 1, -100, 0, 1, 1])
        found, known = (
            layer_statistics(weights, labels, 2),
            layer_statistics(weights[labels >= 0], labels[labels >= 0], 2),
        )
        assert found.explained == known.explained
        assert torch.equal(found.class_means, known.class_means)
        assert found.images == 9
        nobody = layer_statistics(weights, torch.full((9,), -1), 2)
        assert math.isnan(nobody.explained)

    @pytest.mark.parametrize("kernels", [2, 3, 8])
    def test_extremes(self, kernels: int) -> None:
        flat = layer_statistics(torch.full((5, kernels), 1 / kernels))
        assert flat.entropy == pytest.approx(math.log2(kernels))
        assert (flat.relative_entropy, flat.balance) == (pytest.approx(1), pytest.approx(1))
        assert flat.largest == pytest.approx(1 / kernels)
        one = layer_statistics(torch.eye(kernels)[[1] * 5])
        assert (one.entropy, one.largest, one.balance) == (0, 1, pytest.approx(1 / kernels))
        assert one.dead == [kernel for kernel in range(kernels) if kernel != 1]
        each = layer_statistics(torch.eye(kernels))
        assert (each.entropy, each.balance, each.dead) == (0, pytest.approx(1), [])

    @pytest.mark.parametrize(("highest", "dead"), [(0.024, [2]), (0.026, [])])
    def test_a_dead_kernel_is_never_above_a_tenth_of_an_equal_share(self, highest: float, dead: list[int]) -> None:
        weights = torch.tensor([[0.4, 0.3, 0.0, 0.3], [0.4, 0.3, highest, 0.3 - highest]])
        assert layer_statistics(weights).dead == dead
        assert layer_statistics(weights, dead_below=0.11).dead == [2]

    def test_weights_need_not_sum_to_one(self) -> None:
        """As a sigmoid's: shares, entropy and load are those of the weights divided by their sum."""
        weights = routing()
        scaled = layer_statistics(weights * torch.rand(60, 1).add(0.1))
        plain = layer_statistics(weights)
        assert scaled.load.tolist() == pytest.approx(plain.load.tolist())
        assert scaled[2:5] == pytest.approx(plain[2:5])

    def test_images_that_are_not_finite_are_left_out(self) -> None:
        weights, labels = routing(), torch.randint(4, (60,))
        broken = weights.clone()
        broken[[3, 7, 9], [0, 1, 2]] = torch.tensor([NAN, INF, -INF], dtype=torch.float64)
        kept = [image for image in range(60) if image not in (3, 7, 9)]
        found, expected = layer_statistics(broken, labels, 4), layer_statistics(weights[kept], labels[kept], 4)
        assert (found.images, found.not_finite) == (57, 3)
        assert found[2:5] == expected[2:5]
        assert torch.equal(found.class_means, expected.class_means)
        assert found.explained == expected.explained

    def test_nothing_is_left(self) -> None:
        found = layer_statistics(torch.full((2, 3), NAN), torch.tensor([0, 1]), 2)
        assert (found.images, found.not_finite) == (0, 2)
        assert all(math.isnan(value) for value in (found.entropy, found.largest, found.balance, found.explained))
        assert found.dead == []

    def test_without_labels(self) -> None:
        found = layer_statistics(routing())
        assert found.class_means.shape == (0, 3)
        assert math.isnan(found.explained)

    def test_nothing_varies(self) -> None:
        assert math.isnan(layer_statistics(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1]), 2).explained)

    def test_one_kernel(self) -> None:
        found = layer_statistics(torch.ones(4, 1))
        assert (found.entropy, found.balance) == (0, 1)
        assert math.isnan(found.relative_entropy)


def test_shares() -> None:
    weights = torch.tensor([[1.0, 3.0], [-1.0, 1.0], [0.0, 0.0]])
    assert shares(weights).tolist() == [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]


def test_entropy_is_in_bits() -> None:
    assert entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist() == [1, 0]


class TestSimilarity:
    def test_against_loops(self) -> None:
        layers = {"a": routing(40, 3), "b": routing(40, 2), "c": routing(40, 4)}
        found = similarity(layers)

        def squared(a: Tensor, b: Tensor) -> float:
            total = 0.0
            for k in range(a.shape[1]):
                for j in range(b.shape[1]):
                    total += torch.cov(torch.stack([a[:, k], b[:, j]]))[0, 1].item() ** 2
            return total

        for i, a in enumerate(layers.values()):
            for j, b in enumerate(layers.values()):
                expected = squared(a, b) / math.sqrt(squared(a, a) * squared(b, b))
                assert found[i, j].item() == pytest.approx(expected)

    def test_the_order_and_scale_of_kernels_do_not_matter(self) -> None:
        weights = routing()
        assert similarity({"a": weights, "b": 3 * weights[:, [2, 0, 1]]}).flatten().tolist() == pytest.approx([1] * 4)

    def test_unrelated_layers(self) -> None:
        found = similarity({"a": routing(5000), "b": routing(5000)})
        assert found[0, 1] < 0.01

    def test_a_layer_that_does_not_vary_is_like_none(self) -> None:
        found = similarity({"a": routing(), "flat": torch.full((60, 2), 0.5)})
        assert found[0, 0].item() == pytest.approx(1)
        assert found[:, 1].isnan().all()

    def test_what_is_not_finite_counts_as_the_mean(self) -> None:
        a, b = routing(), routing()
        broken = a.clone()
        broken[5, 1] = NAN
        mean = a[[image for image in range(60) if image != 5]].mean(0)
        filled = a.clone()
        filled[5] = mean
        assert torch.allclose(similarity({"a": broken, "b": b}), similarity({"a": filled, "b": b}))
