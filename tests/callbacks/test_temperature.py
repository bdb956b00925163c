import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, WeightAveraging
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from dyn_lightning.callbacks import TemperatureAnnealing
from dyn_lightning.protocols import Annealed
from tests.training import Constant, Mixed, classifier, fit, head, static, warns_once

FALLING = ["linear", "cosine", "exponential"]


class TestSchedule:
    @pytest.mark.parametrize("schedule", FALLING)
    def test_goes_from_start_to_end_and_stays(self, schedule: str) -> None:
        annealing = TemperatureAnnealing(start=20, end=2, schedule=schedule)
        assert [annealing.temperature(p) for p in (0, 1, 1.5, 1000)] == [pytest.approx(t) for t in (20, 2, 2, 2)]

    @pytest.mark.parametrize(("start", "end", "sign"), [(30, 1, -1), (0.5, 8, 1)])
    @pytest.mark.parametrize("schedule", FALLING)
    def test_is_monotone(self, schedule: str, start: float, end: float, sign: int) -> None:
        annealing = TemperatureAnnealing(start=start, end=end, schedule=schedule)
        values = [annealing.temperature(step / 50) for step in range(51)]
        assert all((after - before) * sign > 0 for before, after in pairwise(values))

    @pytest.mark.parametrize(
        ("schedule", "values"),
        [
            ("linear", [16, 12.25, 8.5, 4.75, 1]),
            # 1 + 15 (1 + cos(pi p)) / 2, with cos(pi / 4) = sqrt(1 / 2)
            ("cosine", [16, 8.5 + 7.5 * math.sqrt(0.5), 8.5, 8.5 - 7.5 * math.sqrt(0.5), 1]),
            ("exponential", [16, 8, 4, 2, 1]),
            ("constant", [16, 16, 16, 16, 16]),
        ],
    )
    def test_values_by_hand(self, schedule: str, values: list[float]) -> None:
        annealing = TemperatureAnnealing(start=16, end=1, schedule=schedule)
        assert [annealing.temperature(quarter / 4) for quarter in range(5)] == pytest.approx(values)

    def test_defaults_are_the_papers(self) -> None:
        annealing = TemperatureAnnealing()
        assert (annealing.start, annealing.end, annealing.epochs, annealing.schedule) == (30, 1, 10, "linear")

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"start": 0}, "start=0 must be a finite number above 0"),
            ({"start": math.nan}, "start=nan must be a finite number above 0"),
            ({"end": -1.0}, "end=-1.0 must be a finite number above 0"),
            ({"end": math.inf}, "end=inf must be a finite number above 0"),
            ({"epochs": 0}, "epochs=0 must be above 0"),
            ({"epochs": math.nan}, "epochs=nan must be above 0"),
            ({"schedule": "cosin"}, "schedule='cosin' does not exist, choose one of .*'cosine', 'exponential'"),
        ],
        ids=str,
    )
    def test_refuses(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TemperatureAnnealing(**wrong)


class Seen(Callback):
    """Notes the temperatures of the model's layers when a step begins, and the number of the step."""

    def __init__(self) -> None:
        self.temperatures: list[set[float]] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        self.temperatures.append(temperatures(pl_module))
        self.steps.append(trainer.global_step)


def temperatures(model: nn.Module) -> set[float]:
    return {buffer.item() for name, buffer in model.named_buffers() if name.endswith("temperature")}


def annealing(**options: Any) -> TemperatureAnnealing:
    """From 25 to 1 over two epochs: by 3 a step where an epoch has 4."""
    return TemperatureAnnealing(**{"start": 25, "end": 1, "epochs": 2, **options})


class TestTraining:
    def test_every_step_has_its_temperature(self) -> None:
        seen, model = Seen(), classifier()
        fit(model, None, annealing(), seen, max_epochs=3)
        assert seen.steps == list(range(12))
        assert seen.temperatures == [{float(max(1, 25 - 3 * step))} for step in range(12)]
        assert temperatures(model) == {1.0}

    def test_micro_batches_of_a_step_share_it(self) -> None:
        """Five batches of an epoch give steps of 2, 2 and 1 batches: six steps from 25 to 1."""
        seen = Seen()
        fit(classifier(), None, annealing(), seen, max_epochs=3, limit_train_batches=5, accumulate_grad_batches=2)
        assert seen.steps == [step for epoch in range(3) for step in (0, 0, 1, 1, 2) for step in [3 * epoch + step]]
        assert seen.temperatures == [{float(max(1, 25 - 4 * step))} for step in seen.steps]

    @pytest.mark.parametrize(("epochs", "fall"), [(0.5, 12), (1.5, 4)])
    def test_fractions_of_an_epoch(self, epochs: float, fall: float) -> None:
        seen = Seen()
        fit(classifier(), None, annealing(epochs=epochs), seen)
        assert seen.temperatures == [{float(max(1, 25 - fall * step))} for step in range(4)]

    def test_users_own_layer_takes_part(self) -> None:
        layer = Mixed(Constant(0.25, 0.75))
        fit(classifier(head(layer, channels=1)), None, annealing(), max_epochs=2)
        assert layer.seen[True] == [25, 22, 19, 16, 13, 10, 7, 4]

    def test_validation_sees_that_of_the_next_step(self) -> None:
        layer = Mixed(Constant(0.25, 0.75))
        model = classifier(head(layer, channels=1))
        layer.seen[False].clear()  # the model was tried when it was built
        fit(model, None, annealing(), max_epochs=2, limit_val_batches=1, val_check_interval=2)
        assert layer.seen[False] == [19, 13, 7, 1]

    def test_is_a_function_of_the_step_alone(self, tmp_path: Path) -> None:
        """Another annealing goes on in the third of four epochs as if it had been there from the start."""
        trainer = fit(classifier(), None, TemperatureAnnealing(schedule="constant", start=99), max_epochs=2)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        seen = Seen()
        fit(classifier(), None, annealing(epochs=4), seen, max_epochs=4, ckpt_path=str(tmp_path / "half.ckpt"))
        assert seen.steps == list(range(8, 16))
        assert seen.temperatures == [{25 - 1.5 * step} for step in seen.steps]

    def test_is_logged(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        trainer = fit(classifier(), None, annealing(), logger=logger, max_epochs=2)
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            rows = [(int(row["step"]), float(row["temperature"])) for row in csv.DictReader(file) if row["temperature"]]
        assert rows == [(step, 25 - 3 * step) for step in range(8)]
        assert trainer.logged_metrics["temperature"] == 4

    def test_travels_with_the_checkpoint(self, tmp_path: Path) -> None:
        fit(classifier(), None, annealing(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
        state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        assert {value.item() for name, value in state.items() if name.endswith("temperature")} == {13.0}

    def test_annealed_layers_are_found_in_a_compiled_model(self) -> None:
        seen, model = Seen(), classifier()
        torch.compiler.reset()
        model.backbone = torch.compile(model.backbone, backend="eager")
        fit(model, None, annealing(), seen)
        assert seen.temperatures == [{25.0}, {22.0}, {19.0}, {16.0}]


class TestWeightAverage:
    """A buffer is averaged like a weight; the temperature must not be."""

    @pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging])
    @pytest.mark.parametrize("annealing_first", [True, False])
    def test_has_the_live_temperature(self, averaging: type[WeightAveraging], annealing_first: bool) -> None:
        average = averaging()
        callbacks = [annealing(), average] if annealing_first else [average, annealing()]
        model, at_validation = classifier(), []

        class Validation(Callback):
            def on_validation_batch_start(self, trainer: Trainer, pl_module: nn.Module, *args: Any) -> None:
                at_validation.append((temperatures(pl_module), temperatures(average._average_model)))

        fit(model, None, *callbacks, Validation(), max_epochs=3, limit_val_batches=1)
        assert at_validation == [({13.0}, {13.0}), ({1.0}, {1.0}), ({1.0}, {1.0})]
        assert temperatures(model) == temperatures(average._average_model) == {1.0}

    def test_is_otherwise_an_average(self) -> None:
        """Without the annealing the average of the temperatures would be another one."""
        model = classifier()

        class Set(Callback):
            def on_train_batch_start(self, trainer: Trainer, pl_module: nn.Module, *args: Any) -> None:
                for module in pl_module.modules():
                    if isinstance(module, Annealed):
                        module.set_temperature(25 - 3 * trainer.global_step)

        with warns_once("TemperatureAnnealing"):
            fit(model, None, Set(), WeightAveraging(), max_epochs=2)
        assert [*temperatures(model)] == [pytest.approx((25 + 4) / 2)]


class TestNothingToAnneal:
    def test_warns_once_and_goes_on(self) -> None:
        with warns_once("found no layer with a temperature"):
            trainer = fit(classifier(static()), None, annealing())
        assert trainer.global_step == 4
        assert trainer.logged_metrics["temperature"] == 16
