from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dyn_lightning.ablation.inspection import ALL_MODES, Condition, Inspection, WholeBatches, check_resolutions, uniform
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.routing import AGGREGATIONS, aggregation, replaced
from tests.noise import fill_with_noise_


class Net(nn.Module):
    """Two routed layers that see maps of 8 and of 4 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.low = DynamicConv2d(3, 6, 3, padding=1, num_kernels=3, temperature=1.0)
        self.pool = nn.MaxPool2d(2)
        self.high = CondConv2d(6, 8, 3, padding=1, num_experts=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.pool(self.low(x).relu())).mean((2, 3))


def net() -> Net:
    torch.manual_seed(3)
    model = Net().double().eval()
    fill_with_noise_(model)
    return model


def loader(images: int = 23, batch_size: int = 5) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(0, 8, (images,), generator=generator)), batch_size)


def inspect(
    model: nn.Module, data: DataLoader | WholeBatches, *conditions: Condition, **options: Any
) -> tuple[Inspection, list[dict[str, Any]]]:
    inspection = Inspection(model, conditions or ALL_MODES, **options)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, use_distributed_sampler=False
    )
    with replaced(model, inspection.change):
        trainer.test(inspection, data if isinstance(data, WholeBatches) else WholeBatches(data), verbose=False)
    return inspection, inspection.results()


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


class TestValues:
    @pytest.mark.parametrize("mode", ["attention", "average", "max"])
    def test_equal_to_aggregation(self, mode: str) -> None:
        model, data = net(), loader()
        x, labels = data.dataset.tensors  # type: ignore[attr-defined]
        with torch.no_grad(), aggregation(model, mode):
            logits = model(x)
        best = logits.topk(5).indices == labels[:, None]
        row = by_name(inspect(model, data)[1])[mode]
        assert row["right"] == [int(best[:, 0].sum())]
        assert row["top5"] == pytest.approx(best.sum().item() / 23)
        assert row["top1"] < row["top5"] < 1
        assert row["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)
        assert row["images"] == 23
        assert row["top1_deviation"] is None

    def test_modes_differ(self) -> None:
        losses = [row["loss"] for row in inspect(net(), loader())[1]]
        assert len(set(losses)) == len(AGGREGATIONS)

    def test_draws_of_shuffles_differ(self) -> None:
        inspection, rows = inspect(net(), loader(), draws=4)
        assert [len(row["right"]) for row in rows] == [1, 1, 1, 4, 4]
        assert len(set(inspection.losses.tolist())) == 3 + 2 * 4
        assert by_name(rows)["shuffle_per_image"]["top1_deviation"] is not None

    def test_the_seed_decides(self) -> None:
        first, again, other = (inspect(net(), loader(), seed=seed)[0].losses for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert torch.equal(first[:3], other[:3])
        assert not (first[3:] == other[3:]).any()

    def test_of_one_forward_pass_each(self) -> None:
        model, calls = net(), []
        model.low.register_forward_hook(lambda *args: calls.append(1))
        inspect(model, loader(), draws=2)
        assert len(calls) == 5 * (3 + 2 * 2)

    @pytest.mark.parametrize("batch_size", [2, 7, 23])
    def test_shuffle_per_image_does_not_depend_on_the_batches(self, batch_size: int) -> None:
        conditions = [condition for condition in ALL_MODES if condition.name != "shuffle_across_images"]
        expected = inspect(net(), loader(), *conditions)[0]
        actual = inspect(net(), loader(batch_size=batch_size), *conditions)[0]
        assert torch.equal(actual.counts, expected.counts)
        assert actual.losses == pytest.approx(expected.losses, abs=1e-4)


class TestConditions:
    @pytest.mark.parametrize(
        "condition",
        [
            Condition("attention", layers=["high"]),
            Condition("attention", resolutions=[4]),
            Condition("average", layers=["l*"], elsewhere="attention"),
            Condition("average", resolutions=[8], elsewhere="attention"),
        ],
        ids=lambda condition: condition.name,
    )
    def test_of_some_layers(self, condition: Condition) -> None:
        model, data = net(), loader()
        _, (row,) = inspect(model, data, condition)
        x, labels = data.dataset.tensors  # type: ignore[attr-defined]
        with torch.no_grad(), aggregation(model.low, "average"):
            expected = nn.functional.cross_entropy(model(x), labels).item()
        assert row["loss"] == pytest.approx(expected, abs=1e-6)

    def test_names_say_what_they_are(self) -> None:
        names = [
            Condition("max").name,
            Condition(layers=["a", "b"]).name,
            Condition(layers=["a"], resolutions=[7, 14], elsewhere="max").name,
            Condition(name="mine").name,
        ]
        assert names == [
            "max",
            "attention at a, b, average elsewhere",
            "attention at a of 7, 14, max elsewhere",
            "mine",
        ]

    def test_elsewhere_may_shuffle(self) -> None:
        _, (row,) = inspect(net(), loader(), Condition(layers=["low"], elsewhere="shuffle_per_image"), draws=3)
        assert len(row["right"]) == 3


class TestWholeBatches:
    @pytest.mark.parametrize(
        ("images", "batch_size", "expected"),
        [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (1, 4, [1]), (3, 1, [1, 1, 1]), (5, 9, [5])],
    )
    def test_sizes(self, images: int, batch_size: int, expected: list[int]) -> None:
        batches = WholeBatches(loader(images, batch_size)).batches
        assert list(map(len, batches)) == expected
        assert [place for batch in batches for place in batch] == list(range(images))

    def test_the_hooks_of_the_data_are_called(self) -> None:
        """As of a module that normalises on the device: its batches are those of the Trainer's own test."""

        class Scaled(LightningDataModule):
            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                assert self.trainer is not None
                assert self.trainer.testing
                return batch[0] + 1, batch[1]

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return 3 * batch[0], batch[1]

        model, raw = net(), loader()
        images, labels = raw.dataset.tensors
        changed = DataLoader(TensorDataset(3 * (images + 1), labels), raw.batch_size)
        _, expected = inspect(model, changed, Condition())
        _, plain = inspect(model, raw, Condition())
        _, found = inspect(model, WholeBatches(raw, Scaled()), Condition())
        assert found == expected != plain


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "mean"}, "mode='mean' does not exist"),
            ({"elsewhere": "mean"}, "mode='mean' does not exist"),
            ({"resolutions": [0]}, "resolutions=0 must be at least 1"),
        ],
    )
    def test_a_condition(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Condition(**options)

    @pytest.mark.parametrize(
        ("model", "conditions", "options", "message"),
        [
            (nn.Conv2d(3, 4, 1), ALL_MODES, {}, "the model has no layer that routes images"),
            (net(), [], {}, "conditions is empty"),
            (
                net(),
                [Condition("max"), Condition("max")],
                {},
                "conditions must have different names, these are max, max",
            ),
            (net(), ALL_MODES, {"draws": 0}, "draws=0 must be at least 1"),
            (net(), [Condition(layers=["lows"])], {}, r"matches no routed layer; there are low, high"),
        ],
    )
    def test_an_inspection(
        self, model: nn.Module, conditions: list[Condition], options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Inspection(model, conditions, **options)

    def test_resolutions_that_no_router_sees(self) -> None:
        check_resolutions(net(), [Condition(resolutions=[4, 14])], (3, 8, 8))
        with pytest.raises(ValueError, match=r"resolutions=\[7, 14\] .* there are \[8, 4\] rows"):
            check_resolutions(net(), [Condition(), Condition(resolutions=[7, 14])], (3, 8, 8))

    def test_fewer_batches_than_ranks(self) -> None:
        with pytest.raises(ValueError, match=r"trainer.devices=3, but 9 images in batches of 5 .* are 2 batches"):
            WholeBatches(loader(9)).check(ALL_MODES, ranks=3)

    def test_one_image_in_a_batch(self) -> None:
        with pytest.raises(ValueError, match="'shuffle_across_images' needs 2 images in a batch"):
            WholeBatches(loader(batch_size=1)).check(ALL_MODES)
        WholeBatches(loader(batch_size=1)).check(ALL_MODES[:4])


class TestUniform:
    def test_is_even(self) -> None:
        drawn = uniform(7, torch.arange(100_000))
        assert drawn.min() >= 0
        assert drawn.max() < 1
        assert (drawn.mean() - 0.5).abs() < 0.005
        counts = drawn.histc(20, 0, 1)
        assert (counts / 5_000 - 1).abs().max() < 0.06

    def test_orders_are_even(self) -> None:
        """All six orders of three kernels come equally often."""
        order = uniform(7, torch.arange(60_000)).view(-1, 3).argsort(1)
        counts = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
        assert len(counts) == 6
        assert (counts / (20_000 / 6) - 1).abs().max() < 0.06

    def test_seeds_are_not_alike(self) -> None:
        first, second = (uniform(seed, torch.arange(20_000)) for seed in (7, 8))
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03
