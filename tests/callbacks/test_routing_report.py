import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dyn_lightning.analysis import layer_statistics
from dyn_lightning.callbacks import ExpertExamples, RoutingProjector, RoutingReport, routing_report
from tests.callbacks.boards import constant, drawn, pictures, scalars, texts, train
from tests.callbacks.coded import Routes, data, routed, softmax_rows
from tests.training import Constant, classifier, digits, fit, head, static, warns_once

__all__ = ["drawn"]  # a fixture

FIGURES = {f"routing_report/{name}" for name in ("depth", "similarity", "classes")}


class TestScalars:
    def test_by_hand(self, tmp_path: Path) -> None:
        """Two images of class 0 have the first kernel alone, two of class 1 all four evenly."""
        weights = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [1.0, 0, 0, 0], [0.25] * 4])
        trainer = train(routed(4), data(weights, classes=2), tmp_path, RoutingReport())
        found = {tag: values for tag, values in scalars(trainer).items() if tag.startswith("routing_")}
        load = [0.625, 0.125, 0.125, 0.125]
        in_use = 2 ** -sum(share * math.log2(share) for share in load) / 4
        expected = {
            "routing_entropy": {3: 0.5},
            "routing_entropy_bits": {3: 1.0},
            "routing_largest": {3: 0.625},
            "routing_balance": {3: pytest.approx(in_use)},
            "routing_dead": {3: 0},
            "routing_classes": {3: 1.0},
            "routing_not_finite_images": {3: 0},
        }
        of_the_layer = {f"{tag}/backbone.0": values for tag, values in expected.items()}
        assert found == {"routing_images": {3: 4}, **expected, **of_the_layer}

    def test_of_each_layer_after_each_epoch(self, tmp_path: Path) -> None:
        weights = [softmax_rows(7, 3), softmax_rows(7, 2)]
        trainer = train(routed(3, 2), data(*weights), tmp_path, RoutingReport(), max_epochs=2)
        found = scalars(trainer)
        for layer, each in enumerate(weights):
            expected = layer_statistics(each, torch.arange(7) % 4, 4)
            values = {"entropy": expected.relative_entropy, "largest": expected.largest, "classes": expected.explained}
            for name, value in values.items():
                assert found[f"routing_{name}/backbone.{layer}"] == {step: pytest.approx(value) for step in (3, 7)}

    def test_the_mean_over_the_layers_can_be_monitored(self) -> None:
        """Also without a logger; nothing improves, so the second epoch is the last."""
        stop, weights = EarlyStopping("routing_entropy", patience=1), [softmax_rows(7, 3), softmax_rows(7, 2)]
        callbacks, options = (RoutingReport(), stop), {"limit_val_batches": 1.0, "max_epochs": 4}
        with warns_once("no pictures are drawn"):
            trainer = fit(routed(3, 2), data(*weights), *callbacks, **options)
        expected = [layer_statistics(each, None, 0).relative_entropy for each in weights]
        assert trainer.callback_metrics["routing_entropy"] == pytest.approx(sum(expected) / 2)
        assert trainer.current_epoch == 2

    def test_labels_that_are_not_known(self, tmp_path: Path) -> None:
        weights, names = softmax_rows(8, 3), ("ant", "bee")
        rows = data(weights, class_names=names)
        labels = torch.tensor([0, 1, -1, 0, 1, -100, 0, 1])
        rows.val_set.tensors = (rows.val_set.tensors[0], labels)  # type: ignore[attr-defined]
        model = routed(3)
        step = model.validation_step
        model.validation_step = lambda batch, batch_idx: step((batch[0], batch[1].clamp(min=0)), batch_idx)  # type: ignore
        trainer = train(model, rows, tmp_path, RoutingReport(), ExpertExamples(), RoutingProjector())
        expected = layer_statistics(weights, labels, 2)
        assert scalars(trainer)["routing_classes/backbone.0"] == {3: pytest.approx(expected.explained, abs=1e-6)}
        assert set(pictures(trainer)) == {
            "routing_report/depth",
            "routing_report/classes",
            "expert_examples/backbone.0",
        }

    def test_dead_kernels(self, tmp_path: Path) -> None:
        weights = torch.tensor([[0.98, 0.01, 0.01], [0.7, 0.29, 0.01]])
        found = scalars(train(routed(3), data(weights), tmp_path, RoutingReport(dead_below=0.1)))
        assert found["routing_dead/backbone.0"] == {3: 1}

    def test_other_loggers_get_them(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        with warns_once("no pictures are drawn, since no logger takes them (there is CSVLogger)"):
            callbacks = (RoutingReport(), ExpertExamples())
            fit(routed(2), data(softmax_rows(5, 2)), *callbacks, logger=logger, limit_val_batches=1.0)
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["routing_images"]]
        assert [(row["step"], float(row["routing_images"])) for row in rows] == [("3", 5.0)]

    def test_the_sanity_check_is_not_reported(self, tmp_path: Path) -> None:
        trainer = train(routed(2), data(softmax_rows(5, 2)), tmp_path, RoutingReport(), num_sanity_val_steps=1)
        assert scalars(trainer)["routing_images"] == {3: 5}

    def test_nothing_else_changes(self, tmp_path: Path) -> None:
        """The weights after a training are the same, to the bit, as without the report."""
        states = []
        for callbacks in ((), (RoutingReport(every_n_evaluations=1), ExpertExamples(every_n_evaluations=1))):
            torch.manual_seed(1)
            model = classifier()
            train(model, digits(), tmp_path, constant(), *callbacks, max_epochs=2, limit_val_batches=2)
            states.append(model.state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class TestFigures:
    def test_once_at_the_end(self, tmp_path: Path) -> None:
        """A short training has no time for more."""
        weights = [softmax_rows(7, 3), softmax_rows(7, 2)]
        trainer = train(routed(3, 2), data(*weights), tmp_path, RoutingReport(), max_epochs=3)
        assert pictures(trainer) == {tag: [11] for tag in FIGURES}

    @pytest.mark.parametrize(("every", "steps"), [(1, [3, 7, 11]), (2, [7, 11])])
    def test_as_often_as_wanted(self, every: int, steps: list[int], tmp_path: Path) -> None:
        report = RoutingReport(every_n_evaluations=every)
        trainer = train(routed(3, 2), data(*[softmax_rows(7, k) for k in (3, 2)]), tmp_path, report, max_epochs=3)
        assert pictures(trainer) == {tag: steps for tag in FIGURES}

    def test_of_one_layer(self, tmp_path: Path) -> None:
        trainer = train(routed(3), data(softmax_rows(7, 3)), tmp_path, RoutingReport())
        assert set(pictures(trainer)) == {"routing_report/depth", "routing_report/classes"}

    def test_a_users_own_layer_is_in_all(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        weights = [softmax_rows(7, 3), softmax_rows(7, 2)]
        names = ("cat", "dog", "owl", "yak")
        train(routed(3, 2), data(*weights, class_names=names), tmp_path, RoutingReport(), ExpertExamples())
        assert set(drawn) == FIGURES | {"expert_examples/backbone.0", "expert_examples/backbone.1"}
        for tag in FIGURES:
            assert "of backbone" in texts(drawn[tag])
            assert {"0", "1"} <= set(texts(drawn[tag]).split("\n"))
        assert set(names) <= set(texts(drawn["routing_report/classes"]).split("\n"))

    def test_values(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        weights = [softmax_rows(8, 3), softmax_rows(8, 2)]
        train(routed(3, 2), data(*weights), tmp_path, RoutingReport())
        shown = drawn["routing_report/classes"].axes[0].collections[0].get_array()
        means = [torch.stack([each[label::4].mean(0) for label in range(4)]) for each in weights]
        np.testing.assert_allclose(shown, torch.cat(means, dim=1).numpy(), atol=1e-6)

    def test_a_logger_that_takes_pictures_gets_them(self) -> None:
        class Album(Logger):
            name, version = "album", 0

            def __init__(self) -> None:
                super().__init__()
                self.pages: list[tuple[str, tuple[int, ...], Any, int]] = []

            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

            def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

            def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
                assert step is not None
                self.pages += [(key, image.shape[2:], image.dtype, step) for image in images]

        album = Album()
        fit(routed(2), data(softmax_rows(5, 2)), RoutingReport(), logger=album, limit_val_batches=1.0)
        tags = ["routing_report/depth", "routing_report/classes"]
        assert album.pages == [(tag, (3,), np.uint8, 3) for tag in tags]

    def test_are_drawn_at_once_outside_of_a_training(self, tmp_path: Path) -> None:
        model, loaders = routed(2), data(softmax_rows(5, 2))
        trainer = train(model, loaders, tmp_path, RoutingReport(split="test"))
        assert pictures(trainer) == {}
        trainer.test(model, loaders, verbose=False)
        assert pictures(trainer) == {f"test_{tag}": [4] for tag in FIGURES - {"routing_report/similarity"}}
        assert scalars(trainer)["test_routing_images"] == {4: 5}

    def test_one_that_cannot_be_drawn_does_not_cost_the_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*args: Any) -> None:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(routing_report.figures, "depth", fails)
        with warns_once("a picture could not be drawn: RuntimeError: on purpose"):
            trainer = train(routed(3, 2), data(softmax_rows(7, 3), softmax_rows(7, 2)), tmp_path, RoutingReport())
        assert set(pictures(trainer)) == FIGURES - {"routing_report/depth"}

    def test_names_with_signs_of_formulas(self, tmp_path: Path) -> None:
        rows = data(softmax_rows(8, 3), class_names=("$5_$", "a_b", "x^$", "\\frac"))
        trainer = train(routed(3), rows, tmp_path, RoutingReport(), ExpertExamples())
        assert {"routing_report/classes", "expert_examples/backbone.0"} <= set(pictures(trainer))

    def test_an_interrupted_training_shows_its_last_evaluation(self, tmp_path: Path) -> None:
        class Interrupt(Callback):
            def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
                if trainer.global_step == 6:
                    raise RuntimeError("on purpose")

        logger = TensorBoardLogger(tmp_path)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(
                routed(3), data(softmax_rows(8, 3)), tmp_path, RoutingReport(), Interrupt(), logger=logger, max_epochs=3
            )
        read = EventAccumulator(logger.log_dir).Reload()
        assert [event.step for event in read.Images("routing_report/depth")] == [3]


class TestNotFinite:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_is_counted_and_named_once(self, bad: float, tmp_path: Path) -> None:
        weights = softmax_rows(7, 2)
        weights[2, 1] = weights[5, 0] = bad
        with warns_once("routing weights are NaN or infinite at step 3 in backbone.1 (2)"):
            trainer = train(routed(3, 2), data(softmax_rows(7, 3), weights), tmp_path, RoutingReport(), max_epochs=2)
        found = scalars(trainer)
        assert found["routing_not_finite_images/backbone.0"] == {3: 0, 7: 0}
        assert found["routing_not_finite_images/backbone.1"] == {3: 2, 7: 2}
        expected = layer_statistics(weights[torch.tensor([0, 1, 3, 4, 6])])
        assert found["routing_entropy/backbone.1"][7] == pytest.approx(expected.relative_entropy)
        assert trainer.global_step == 8
        assert set(pictures(trainer)) == FIGURES

    def test_can_end_the_training(self, tmp_path: Path) -> None:
        weights = torch.full((5, 2), math.nan)
        with warns_once("in backbone.0 (5): the training ends here"):
            report = RoutingReport(stop_when_not_finite=True)
            trainer = train(routed(2), data(weights), tmp_path, report, max_epochs=3)
        assert trainer.global_step == 4


class Plain(LightningModule):
    """A user's own module, whose batches are images alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.scale * self.layer(batch[0]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.layer(batch["pixels"] if isinstance(batch, dict) else batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class TestWhatIsMissing:
    def test_no_routed_layer(self, tmp_path: Path) -> None:
        with warns_once("the model has no routed layer (routers()): there is no routing to show"):
            trainer = train(classifier(static()), digits(), tmp_path, RoutingReport(), limit_val_batches=1)
        assert pictures(trainer) == {}

    def test_no_logger(self) -> None:
        with warns_once("no pictures are drawn, since no logger takes them (there is no logger)"):
            fit(routed(2), data(softmax_rows(5, 2)), RoutingReport(), ExpertExamples(), limit_val_batches=1.0)

    @pytest.mark.parametrize("form", ["tuple", "dict"])
    def test_no_labels(self, form: str, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        rows, model = data(softmax_rows(5, 2)), Plain(routed(2).backbone[0])
        pairs: Any = [(image,) if form == "tuple" else {"pixels": image} for image, _ in rows.val_set]
        rows.val_set = pairs
        trainer = train(model, rows, tmp_path, RoutingReport(), ExpertExamples())
        assert set(pictures(trainer)) == {"routing_report/depth", "expert_examples/layer"}
        assert "nothing to measure" in texts(drawn["routing_report/depth"])
        assert "routing_classes/layer" not in scalars(trainer)
        assert scalars(trainer)["routing_images"] == {3: 5}

    def test_images_of_another_number(self, tmp_path: Path) -> None:
        """A layer that sees crops of the images, say, has no row an image."""

        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([x, x])[:, 0, 0, :2]

        model = classifier(head(routed(3).backbone[0], Routes(Twice()), channels=1))
        with warns_once("RoutingReport leaves out backbone.1: routing weights with other than a row an image"):
            trainer = train(model, data(softmax_rows(5, 3)), tmp_path, RoutingReport(), max_epochs=2)
        assert scalars(trainer)["routing_images"] == {3: 5, 7: 5}
        assert not [tag for tag in scalars(trainer) if tag.endswith("backbone.1")]

    def test_only_the_first_of_several_loaders(self, tmp_path: Path) -> None:
        rows, more = data(softmax_rows(5, 2)), data(softmax_rows(9, 2))
        model = routed(2)
        rows.val_dataloader = lambda: [DataLoader(each.val_set, 3) for each in (rows, more)]  # type: ignore[assignment]
        step = model.validation_step
        model.validation_step = lambda batch, batch_idx, dataloader_idx=0: step(batch, batch_idx)  # type: ignore
        trainer = train(model, rows, tmp_path, RoutingReport())
        assert scalars(trainer)["routing_images"] == {3: 5}


class TestNumerics:
    def test_bfloat16(self, tmp_path: Path) -> None:
        model = classifier()
        trainer = train(
            model, digits(), tmp_path, constant(), RoutingReport(), precision="bf16-mixed", limit_val_batches=2
        )
        found = scalars(trainer)
        assert found["routing_images"] == {3: 32}
        assert 0.9 < found["routing_entropy/backbone.0"][3] <= 1

    @pytest.mark.parametrize("in_place", [True, False])
    def test_compiled(self, in_place: bool, tmp_path: Path) -> None:
        torch.compiler.reset()
        plain, model = classifier(), classifier()
        model.load_state_dict(plain.state_dict())
        if in_place:
            model.backbone.compile(backend="aot_eager")
        else:
            model.backbone = torch.compile(model.backbone, backend="aot_eager")
        found = [
            scalars(
                train(each, digits(), tmp_path / str(n), constant(), RoutingReport(), max_epochs=2, limit_val_batches=2)
            )
            for n, each in enumerate((plain, model))
        ]
        routing = [tag for tag in found[0] if tag.startswith("routing_")]
        assert routing
        for tag in routing:
            assert found[1][tag] == pytest.approx(found[0][tag], abs=1e-4)


class TestResume:
    def test_curves_go_on(self, tmp_path: Path) -> None:
        rows = data(softmax_rows(5, 2))
        half = train(routed(2), rows, tmp_path / "half", RoutingReport(every_n_evaluations=1), max_epochs=2)
        half.save_checkpoint(tmp_path / "half.ckpt")
        options: dict[str, Any] = {"max_epochs": 4, "ckpt_path": str(tmp_path / "half.ckpt")}
        trainer = train(routed(2), rows, tmp_path, RoutingReport(every_n_evaluations=1), **options)
        assert list(scalars(trainer)["routing_images"]) == [11, 15]
        assert pictures(trainer)["routing_report/depth"] == [11, 15]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_images": 0}, "max_images=0 must be at least 1"),
        ({"split": "valid"}, r"split='valid' must be one of \['val', 'test'\]"),
        ({"every_n_evaluations": 0}, "every_n_evaluations=0 must be at least 1"),
        ({"dead_below": 1.5}, "dead_below=1.5 must be from 0 to 1"),
        ({"dead_below": math.nan}, "dead_below=nan must be from 0 to 1"),
    ],
    ids=str,
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingReport(**wrong)


def test_layers_of_one_value_need_no_data(tmp_path: Path) -> None:
    """A router that gives all images the same has nothing to explain, and no likeness with others."""
    model = classifier(head(Routes(Constant(0.25, 0.75)), Routes(Constant(0.5, 0.5)), channels=1))
    trainer = train(model, digits(), tmp_path, RoutingReport(), limit_val_batches=1)
    assert "routing_classes/backbone.0" not in scalars(trainer)
    assert set(pictures(trainer)) == FIGURES
