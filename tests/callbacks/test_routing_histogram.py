import csv
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dyn_lightning.callbacks import RoutingHistogram, TemperatureAnnealing
from dyn_lightning.layers import CondConv2d
from dyn_lightning.routing import named_routers
from tests.training import Constant, Mixed, Raise, classifier, digits, fit, head, static, warns_once


class Rows(nn.Module):
    """Gives the samples of a batch these routing weights."""

    def __init__(self, *rows: tuple[float, ...]) -> None:
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[: len(x)]


def train(model: LightningModule, folder: Path, *callbacks: Callback, batch_size: int = 16, **options: Any) -> Trainer:
    """Train, and write to TensorBoard."""
    return fit(model, digits(batch_size), *callbacks, logger=TensorBoardLogger(folder), **options)


def read(trainer: Trainer) -> EventAccumulator:
    return EventAccumulator(trainer.logger.log_dir, size_guidance={"histograms": 0, "scalars": 0}).Reload()


def histograms(trainer: Trainer) -> dict[str, dict[int, Any]]:
    """Give the histograms by tag and step."""
    board = read(trainer)
    return {
        tag: {event.step: event.histogram_value for event in board.Histograms(tag)}
        for tag in board.Tags()["histograms"]
    }


def counts(value: Any, bins: int) -> list[float]:
    """Give the counts of all bins of a histogram; empty ones at the ends are written as one."""
    places = [round(limit * bins) for limit in value.bucket_limit]
    assert value.bucket_limit == pytest.approx([place / bins for place in places])
    assert (places[0], places[-2:], value.bucket[0]) == (0, [bins - 1, bins], 0)
    found: list[float] = []
    for (begin, end), count in zip(pairwise(places), value.bucket[1:], strict=True):
        assert count == 0 or end == begin + 1
        found += [count] * (end - begin)
    return found


def mixed(router: nn.Module, kernels: int = 2) -> LightningModule:
    """Classify with one routed layer, ``backbone.0``."""
    return classifier(head(Mixed(router, kernels), channels=1))


def constant() -> TemperatureAnnealing:
    return TemperatureAnnealing(schedule="constant", start=7)


class TestWritten:
    def test_each_layer_and_kernel_has_a_tag(self, tmp_path: Path) -> None:
        trainer = train(classifier(), tmp_path, constant(), RoutingHistogram())
        expected = {f"routing/backbone.0/{kernel}" for kernel in range(3)}
        expected |= {f"routing/backbone.2/{kernel}" for kernel in range(2)}
        assert set(histograms(trainer)) == expected

    @pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6]), (50, [0])])
    def test_in_the_steps_that_are_due(self, every: int, steps: list[int], tmp_path: Path) -> None:
        trainer = train(classifier(), tmp_path, constant(), RoutingHistogram(every), max_epochs=2)
        assert {tag: list(events) for tag, events in histograms(trainer).items()} == {
            tag: steps for tag in histograms(trainer)
        }
        assert histograms(trainer)

    def test_accumulated_steps_are_written_once(self, tmp_path: Path) -> None:
        trainer = train(
            classifier(), tmp_path, constant(), RoutingHistogram(2), max_epochs=2, accumulate_grad_batches=2
        )
        board = read(trainer)
        assert [event.step for event in board.Histograms("routing/backbone.0/0")] == [0, 2]

    def test_known_weights(self, tmp_path: Path) -> None:
        trainer = train(mixed(Constant(0.25, 0.75)), tmp_path, constant(), RoutingHistogram(2, bins=8))
        found = histograms(trainer)
        for kernel, (weight, place) in enumerate([(0.25, 2), (0.75, 6)]):
            for step in (0, 2):
                value = found[f"routing/backbone.0/{kernel}"][step]
                assert value.num == 16
                assert value.sum == 16 * weight
                assert value.sum_squares == 16 * weight**2
                assert counts(value, 8) == [16 * (place == index) for index in range(8)]
                assert len(value.bucket) == 5 - kernel  # below 0, empty, its bin, empty (not beside the last), the last
                assert value.min <= weight <= value.max

    def test_counts_by_hand(self, tmp_path: Path) -> None:
        """Values outside [0, 1] count in the first and last bin, and an edge in the bin that it begins."""
        router = Rows((0.0, 1.0, -3.0), (0.1, 0.26, 0.5), (0.24, 0.3, 9.0), (0.6, 0.99, 1.0))
        trainer = train(mixed(router, 3), tmp_path, constant(), RoutingHistogram(bins=4), batch_size=4)
        found = histograms(trainer)
        expected = {0: [3, 0, 1, 0], 1: [0, 2, 0, 2], 2: [1, 0, 1, 2]}
        for kernel, by_hand in expected.items():
            value = found[f"routing/backbone.0/{kernel}"][0]
            assert counts(value, 4) == by_hand
            assert value.sum == pytest.approx(router.rows[:, kernel].sum().item())
            assert value.sum_squares == pytest.approx(router.rows[:, kernel].square().sum().item())

    def test_the_weights_are_those_of_the_training_batch(self, tmp_path: Path) -> None:
        """Against the router's own outputs, noted as they are made."""
        seen, model = [], classifier(head(CondConv2d(1, 6, 3, num_experts=3), channels=6))
        model.backbone[0].router.register_forward_hook(lambda router, args, output: seen.append(output.detach()))
        trainer = train(model, tmp_path, RoutingHistogram(1, bins=10))
        found = histograms(trainer)
        assert len(seen) == 4
        for step, weights in enumerate(seen):
            for kernel in range(3):
                value = found[f"routing/backbone.0/{kernel}"][step]
                assert counts(value, 10) == weights[:, kernel].histc(10, 0, 1).tolist()
                assert value.sum == pytest.approx(weights[:, kernel].sum().item(), rel=1e-5)

    @pytest.mark.parametrize("in_place", [True, False])
    def test_compiled(self, in_place: bool, tmp_path: Path) -> None:
        """Also in steps after the first, when the network was compiled without the hooks."""
        torch.compiler.reset()
        model = classifier()
        if in_place:
            model.backbone.compile(backend="aot_eager")
        else:
            model.backbone = torch.compile(model.backbone, backend="aot_eager")
        trainer = train(model, tmp_path, constant(), RoutingHistogram(2))
        found = {tag.replace("_orig_mod.", ""): [*events] for tag, events in histograms(trainer).items()}
        assert found == {f"routing/backbone.{layer}": [0, 2] for layer in ("0/0", "0/1", "0/2", "2/0", "2/1")}

    def test_another_training_is_written_too(self, tmp_path: Path) -> None:
        callback = RoutingHistogram(50)
        for name in ("first", "second"):
            trainer = train(classifier(), tmp_path / name, constant(), callback)
            assert [[*events] for events in histograms(trainer).values()] == [[0]] * 5


class TestNotFinite:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_is_counted_and_the_rest_written(self, bad: float, tmp_path: Path) -> None:
        router = Rows((bad, 0.6), (0.1, 0.6), (bad, bad), (0.4, 0.1))
        with warns_once("NaN or infinite at step 0 in backbone.0 (3)"):
            trainer = train(mixed(router), tmp_path, constant(), RoutingHistogram(2, bins=2), batch_size=4)
        assert trainer.global_step == 4
        board = read(trainer)
        assert [(event.step, event.value) for event in board.Scalars("routing_not_finite/backbone.0")] == [
            (0, 3),
            (2, 3),
        ]
        for kernel, (by_hand, total) in enumerate([([2, 0], 0.5), ([1, 2], 1.3)]):
            value = histograms(trainer)[f"routing/backbone.0/{kernel}"][0]
            assert counts(value, 2) == by_hand
            assert value.num == sum(by_hand)
            assert value.sum == pytest.approx(total)

    def test_other_loggers_get_the_count(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(NaN or infinite|no pictures are drawn)")
            fit(mixed(Constant(float("nan"), 0.5)), None, constant(), RoutingHistogram(2), logger=logger)
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            counts = [(row["step"], row["routing_not_finite/backbone.0"]) for row in csv.DictReader(file)]
        assert [(step, count) for step, count in counts if count] == [("0", "16.0"), ("2", "16.0")]

    def test_nothing_is_left(self, tmp_path: Path) -> None:
        with warns_once("NaN or infinite"):
            trainer = train(mixed(Constant(float("nan"), 0.5)), tmp_path, constant(), RoutingHistogram())
        value = histograms(trainer)["routing/backbone.0/0"][0]
        assert (value.num, value.sum, sum(value.bucket)) == (0, 0, 0)
        assert read(trainer).Scalars("routing_not_finite/backbone.0")[0].value == 16

    def test_no_tag_where_all_is_well(self, tmp_path: Path) -> None:
        trainer = train(classifier(), tmp_path, constant(), RoutingHistogram())
        assert [tag for tag in read(trainer).Tags()["scalars"] if "not_finite" in tag] == []

    def test_can_end_the_training(self, tmp_path: Path) -> None:
        model, callback = mixed(Constant(float("nan"), 0.5)), RoutingHistogram(2, stop_when_not_finite=True)
        with warns_once("NaN or infinite at step 0 in backbone.0 (16): the training ends here"):
            trainer = train(model, tmp_path, constant(), callback)
        assert trainer.global_step == 1


class TestNothingToWrite:
    def test_without_tensorboard_it_warns_once(self, tmp_path: Path) -> None:
        with warns_once("no pictures are drawn, since no logger takes them"):
            trainer = fit(classifier(), None, constant(), RoutingHistogram(1), logger=CSVLogger(tmp_path))
        assert trainer.global_step == 4

    def test_without_a_routed_layer_it_warns_once(self, tmp_path: Path) -> None:
        with warns_once("the model has no routed layer (routers()): there is no routing to show"):
            trainer = train(classifier(static()), tmp_path, RoutingHistogram(1))
        assert trainer.global_step == 4
        assert histograms(trainer) == {}


class TestHooks:
    def hooks(self, model: nn.Module) -> int:
        return sum(len(router._forward_hooks) for router in named_routers(model).values())

    def test_are_gone_after_the_training(self, tmp_path: Path) -> None:
        model = classifier()
        train(model, tmp_path, constant(), RoutingHistogram(1))
        assert self.hooks(model) == 0

    def test_are_gone_after_an_exception(self, tmp_path: Path) -> None:
        model = classifier()
        with pytest.raises(RuntimeError, match="on purpose"):
            train(model, tmp_path, constant(), RoutingHistogram(1), Raise(step=2))
        assert self.hooks(model) == 0

    def test_are_gone_after_an_epoch_that_the_model_ends_early(self, tmp_path: Path) -> None:
        model = classifier()
        model.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 2 else None  # type: ignore
        train(model, tmp_path, constant(), RoutingHistogram(1))
        assert self.hooks(model) == 0

    def test_are_there_in_the_steps_that_are_due_alone(self, tmp_path: Path) -> None:
        counts = []

        class Count(Callback):
            def on_before_backward(self, trainer: Trainer, pl_module: nn.Module, loss: Tensor) -> None:
                counts.append(TestHooks().hooks(pl_module))

        train(classifier(), tmp_path, constant(), RoutingHistogram(2), Count())
        assert counts == [2, 0, 2, 0]

    def test_an_interrupted_step_is_not_written_later(self, tmp_path: Path) -> None:
        callback = RoutingHistogram(3)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(classifier(), tmp_path / "first", constant(), callback, Raise(step=3))
        half = train(classifier(), tmp_path / "half", constant())
        half.save_checkpoint(tmp_path / "half.ckpt")
        trainer = train(
            classifier(), tmp_path, constant(), callback, max_epochs=2, ckpt_path=str(tmp_path / "half.ckpt")
        )
        assert [[*events] for events in histograms(trainer).values()] == [[6]] * 5


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"bins": 0}, {"every_n_steps": -1}], ids=str)
def test_refuses(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        RoutingHistogram(**wrong)
