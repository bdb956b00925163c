import csv
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from dyn_lightning.callbacks import TemperatureAnnealing
from dyn_lightning.classifier import ImageClassifier, MeanLoss
from dyn_lightning.data.module import derive_seed
from dyn_lightning.layers import CondConv2d, DGConv2d, DOConv2d, DynamicConv2d
from tests.noise import randomize_norms_
from tests.tolerances import assert_close
from tests.training import TASK, Batches, Constant, Mixed, classifier, digits, dynamic, fit, head, static, warns_once

HERE = __name__


class Own(DynamicConv2d):
    """A user's own layer."""


class OwnSGD(torch.optim.SGD):
    """A user's own optimizer, which wants an option."""

    def __init__(self, params: Any, own: int, **options: Any) -> None:
        super().__init__(params, **options)
        self.own = own


class OwnSchedule(torch.optim.lr_scheduler.ExponentialLR):
    """A user's own schedule."""


class Named(nn.Module):
    """A user's own network, whose features are called as our classifier calls the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = static()[:-1]
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def constant() -> TemperatureAnnealing:
    return TemperatureAnnealing(schedule="constant", start=7)


def logged(trainer: Trainer, name: str) -> list[float]:
    with (Path(trainer.logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


class TestSchedule:
    def test_default_falls_to_zero_step_by_step(self, tmp_path: Path) -> None:
        trainer = fit(classifier(static(), lr=0.2), max_epochs=2, logger=CSVLogger(tmp_path))
        expected = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
        assert logged(trainer, "train/lr") == pytest.approx(expected)

    def test_default_with_warmup(self, tmp_path: Path) -> None:
        trainer = fit(classifier(static(), lr=0.2, warmup_epochs=0.75), max_epochs=2, logger=CSVLogger(tmp_path))
        cosine = [0.1 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
        assert logged(trainer, "train/lr") == pytest.approx([0.05, 0.1, 0.15, *cosine])

    def test_counts_accumulated_steps_once(self, tmp_path: Path) -> None:
        trainer = fit(classifier(static(), lr=0.2), max_epochs=4, accumulate_grad_batches=2, logger=CSVLogger(tmp_path))
        expected = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
        assert logged(trainer, "train/lr") == pytest.approx(expected)

    def test_warmup_is_in_epochs_also_where_steps_end_the_training(self, tmp_path: Path) -> None:
        """One epoch of four steps, and then twelve more."""
        options = {"max_epochs": -1, "max_steps": 16, "logger": CSVLogger(tmp_path)}
        trainer = fit(classifier(static(), lr=0.2, warmup_epochs=1), None, **options)
        cosine = [0.1 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
        assert logged(trainer, "train/lr") == pytest.approx([0.04, 0.08, 0.12, 0.16, *cosine])

    @pytest.mark.parametrize("name", ["ExponentialLR", "torch.optim.lr_scheduler.ExponentialLR", f"{HERE}.OwnSchedule"])
    def test_others_step_every_epoch(self, name: str, tmp_path: Path) -> None:
        model = classifier(static(), lr=0.2, scheduler=name, scheduler_args={"gamma": 0.5})
        trainer = fit(model, max_epochs=3, logger=CSVLogger(tmp_path))
        assert logged(trainer, "train/lr") == pytest.approx([0.2] * 4 + [0.1] * 4 + [0.05] * 4)

    def test_reduce_on_plateau_watches_the_validation_loss(self, tmp_path: Path) -> None:
        """A loss that must fall by 99 % never does: each epoch after the first halves the rate."""
        options = {"patience": 0, "factor": 0.5, "threshold": 0.99}
        model = classifier(static(), lr=0.2, scheduler="ReduceLROnPlateau", scheduler_args=options)
        trainer = fit(model, max_epochs=4, limit_val_batches=2, logger=CSVLogger(tmp_path))
        assert trainer.lr_scheduler_configs[0].monitor == "val/loss"
        assert logged(trainer, "train/lr") == pytest.approx([0.2] * 8 + [0.1] * 4 + [0.05] * 4)


class TestOptimizer:
    def test_gets_the_parameter_groups(self) -> None:
        trainer = fit(classifier(weight_decay=0.3, lr=0.2), None, constant())
        assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0.3, 0]
        assert [group["initial_lr"] for group in trainer.optimizers[0].param_groups] == [0.2, 0.2]

    @pytest.mark.parametrize(
        ("name", "options", "kind"),
        [
            ("SGD", {"momentum": 0.7, "nesterov": True}, torch.optim.SGD),
            ("AdamW", {"betas": (0.8, 0.9)}, torch.optim.AdamW),
            ("torch.optim.RMSprop", {"alpha": 0.7}, torch.optim.RMSprop),
            (f"{HERE}.OwnSGD", {"own": 4, "momentum": 0.3}, OwnSGD),
        ],
    )
    def test_by_name_with_options(self, name: str, options: dict[str, Any], kind: type) -> None:
        optimizer = fit(classifier(static(), optimizer=name, optimizer_args=options, lr=0.01)).optimizers[0]
        assert type(optimizer) is kind
        found = {**vars(optimizer), **optimizer.param_groups[0]}
        assert {key: found[key] for key in options} == options

    def test_the_network_learns(self, tmp_path: Path) -> None:
        model = classifier(static(), optimizer="Adam", lr=0.02)
        trainer = fit(model, digits(64), max_epochs=8, limit_train_batches=1.0, logger=CSVLogger(tmp_path))
        losses = logged(trainer, "train/loss")
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optimizer": "SGDD"}, "optimizer='SGDD' does not exist .*torch.optim has .*SGD.*"),
            ({"optimizer": "nowhere.SGD"}, "optimizer='nowhere.SGD' does not exist .there is no module 'nowhere'"),
            ({"optimizer_args": {"nonsense": 1}}, "optimizer='SGD' with {'nonsense': 1}: .*nonsense"),
            ({"optimizer_args": {"momentum": -1}}, "optimizer='SGD' with {'momentum': -1}: Invalid momentum"),
            ({"lr": -1.0}, "lr=-1.0 must be a finite number, 0 or more"),
            ({"optimizer": f"{HERE}.OwnSGD"}, f"optimizer='{HERE}.OwnSGD' with None: .*'own'"),
            ({"scheduler": "Cosine"}, "scheduler='Cosine' does not exist .*CosineAnnealingLR"),
            ({"scheduler": f"{HERE}.Nothing"}, f"scheduler='{HERE}.Nothing' does not exist .*no 'Nothing'"),
            ({"scheduler": "StepLR"}, "scheduler='StepLR' with {}: .*step_size"),
            (
                {"scheduler": "StepLR", "scheduler_args": {"step_size": 1, "nonsense": 1}},
                "scheduler='StepLR' with {'step_size': 1, 'nonsense': 1}: .*nonsense",
            ),
            (
                {"scheduler": "ReduceLROnPlateau", "scheduler_args": {"factor": 2}},
                "scheduler='ReduceLROnPlateau' with {'factor': 2}: .*[Ff]actor",
            ),
        ],
        ids=str,
    )
    def test_refuses_at_construction(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            classifier(static(), **options)


class TestLoss:
    def test_is_the_cross_entropy(self, tmp_path: Path) -> None:
        model, batches = classifier(static(), lr=0.0), Batches()
        trainer = fit(model, None, batches, logger=CSVLogger(tmp_path))
        model.train()
        expected = [F.cross_entropy(model(images), labels).item() for images, labels in batches.seen]
        assert logged(trainer, "train/loss") == pytest.approx(expected, rel=1e-5)

    def test_label_smoothing_by_hand(self, tmp_path: Path) -> None:
        """0.4 of the label is spread evenly; the logits do not depend on the image, so any batch has this loss."""
        model = classifier(head(nn.Conv2d(1, 1, 1), channels=1), lr=0.0, label_smoothing=0.4)
        for parameter in model.backbone.parameters():
            nn.init.zeros_(parameter)
        model.backbone[-1].bias.data.copy_(torch.linspace(-1, 1, 10))
        batches = Batches()
        trainer = fit(model, None, batches, logger=CSVLogger(tmp_path))
        log = torch.linspace(-1, 1, 10).log_softmax(0)
        expected = [-(0.6 * log[labels].mean() + 0.4 * log.mean()).item() for _, labels in batches.seen]
        assert logged(trainer, "train/loss") == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
    def test_mixing(self, options: dict[str, float], tmp_path: Path) -> None:
        model = classifier(static(), label_smoothing=0.1, **options)
        trainer = fit(model, max_epochs=2, logger=CSVLogger(tmp_path))
        assert all(math.isfinite(loss) for loss in logged(trainer, "train/loss"))
        assert len(logged(trainer, "train/loss")) == 8
        images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
        mixed, targets = model.mix(images, labels)
        assert targets.shape == (16, 10)
        assert_close(targets.sum(1), torch.ones(16))
        assert not torch.equal(mixed, images)

    def test_both_take_turns(self) -> None:
        """A batch that mixup changed is blended everywhere, one that CutMix changed is whole outside of a box."""
        model = classifier(static(), mixup=1.0, cutmix=1.0)
        images = torch.arange(1.0, 5)[:, None, None, None].expand(4, 1, 8, 8)
        kinds = {bool(model.mix(images, torch.arange(4))[0].frac().any()) for _ in range(30)}
        assert kinds == {True, False}

    def test_evaluation_does_not_mix(self) -> None:
        model = classifier(static(), mixup=1.0, label_smoothing=0.5)
        trainer = fit(model, limit_val_batches=1.0)
        assert trainer.callback_metrics["val/loss"].item() == pytest.approx(evaluate(model, "val")["loss"], rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label_smoothing": -0.1}, "label_smoothing=-0.1 must be from 0 to 1"),
            ({"label_smoothing": 1.5}, "label_smoothing=1.5 must be from 0 to 1"),
            ({"mixup": -1}, "mixup=-1 must be a finite number, 0 or more"),
            ({"cutmix": -0.5}, "cutmix=-0.5 must be a finite number, 0 or more"),
        ],
        ids=str,
    )
    def test_refuses(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            classifier(static(), **options)


class TestGroupBudget:
    def test_the_loss_is_that_of_the_paper(self, tmp_path: Path) -> None:
        """loss * (budget / complexity) ** -0.02 above the budget, and the loss within it."""

        def train(divisor: float | None) -> tuple[ImageClassifier, list[float], list[float]]:
            torch.manual_seed(0)
            backbone = head(nn.Conv2d(1, 8, 3), DGConv2d(8, 8, 3, gate_init="dense"), channels=8)
            model = classifier(backbone, lr=0.0, group_budget=divisor)
            trainer = fit(model, logger=CSVLogger(tmp_path))
            names = ("train/loss", "train/complexity")
            return model, *(logged(trainer, name) if name in trainer.callback_metrics else [] for name in names)

        (_, plain, none), (_, within, one), (_, above, four) = train(None), train(1), train(4)
        assert none == []
        assert one == [1.0] * 4
        assert four == [4.0] * 4
        assert within == plain
        assert above == pytest.approx([loss * (1 / 4) ** -0.02 for loss in plain], rel=1e-5)

    def test_it_closes_gates(self) -> None:
        torch.manual_seed(0)
        backbone = head(nn.Conv2d(1, 8, 3), DGConv2d(8, 8, 3, gate_init="dense"), channels=8)
        model = classifier(backbone, lr=0.0, group_budget=8)
        model.hparams["lr"] = 1.0
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter is backbone[1].gates)
        backbone[-1].weight.data.zero_()  # the images say nothing, the budget is all there is
        fit(model)
        assert (backbone[1].gates < 0).any()

    @pytest.mark.parametrize(
        ("divisor", "message"),
        [
            (0, "group_budget=0 must be a finite number, 1 or more"),
            (math.nan, "group_budget=nan must be a finite number, 1 or more"),
            (4, "group_budget=4 needs layers that learn their groups, and the model has none: set conv: dgconv"),
        ],
    )
    def test_refuses(self, divisor: float, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            classifier(static(), group_budget=divisor)


@torch.no_grad()
def evaluate(model: ImageClassifier, split: str) -> dict[str, float]:
    """Count by hand over a whole split of the digits."""
    images, labels = map(torch.stack, zip(*getattr(digits(), f"{split}_set"), strict=True))
    logits = model.eval()(images)
    ranked = logits.argsort(1, descending=True) == labels[:, None]
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "top1": ranked[:, :1].any(1).double().mean().item(),
        "top5": ranked[:, :5].any(1).double().mean().item(),
    }


class TestMetrics:
    """180 images to validate and 360 to test: the last batch is smaller."""

    @pytest.mark.parametrize("batch_size", [64, 100, 1000])
    def test_equal_a_count_by_hand(self, batch_size: int) -> None:
        model = classifier(static())
        trainer = fit(model, digits(batch_size), limit_train_batches=3, limit_val_batches=1.0, max_epochs=2)
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        trainer.test(model, digits(batch_size), verbose=False)
        found |= {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        expected = {
            f"{split}/{name}": value for split in ("val", "test") for name, value in evaluate(model, split).items()
        }
        assert found == pytest.approx(expected, rel=1e-5)
        assert 0 < found["test/top1"] < found["test/top5"] < 1

    def test_top5_needs_more_than_five_classes(self) -> None:
        model = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), num_classes=5)
        assert (list(model.val_metrics), list(model.test_metrics)) == (["val/top1"], ["test/top1"])


class TestBackbone:
    def test_by_name(self) -> None:
        model = ImageClassifier("cifar_resnet", {"depth": 8, "width": 4}, conv="dynamic", **TASK)
        assert len(model.conversion.replaced) == 6
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)

    def test_as_a_module(self) -> None:
        backbone = static()
        model = ImageClassifier(backbone, conv="condconv", conv_args={"num_experts": 3}, **TASK)
        assert model.backbone is backbone
        assert len(backbone[3].weight) == 3
        assert "backbone" not in model.hparams

    def test_static_is_left_as_it_is(self) -> None:
        model = ImageClassifier(static(), conv_args={"num_kernels": 4}, **TASK)
        assert model.conversion is None
        assert type(model.backbone[3]) is nn.Conv2d

    def test_include_and_exclude(self) -> None:
        model = ImageClassifier(
            "cifar_resnet", {"depth": 8}, conv="dynamic", include=["layer*"], exclude="*.conv2", **TASK
        )
        assert model.conversion.replaced == [f"layer{stage}.0.conv1" for stage in (1, 2, 3)]

    def test_trying_it_leaves_no_trace(self) -> None:
        backbone = randomize_norms_(static())
        backbone[1].eval()
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        classifier(backbone)
        assert [module.training for module in backbone] == [True, False, *[True] * (len(backbone) - 2)]
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
        assert all(parameter.grad is None for parameter in backbone.parameters())

    def test_channels_default_to_three(self) -> None:
        assert ImageClassifier("cifar_resnet", num_classes=7).backbone.conv1.in_channels == 3

    @pytest.mark.parametrize(
        ("backbone", "task", "message"),
        [
            (static(), {"channels": 3}, "first convolution '0' takes 1 channels, but the images have 3"),
            (static(), {"num_classes": 7}, "gives (2, 10) for 2 images; with 7 classes it must give (2, 7)"),
            (nn.Identity(), {}, "gives (2, 1, 8, 8) for 2 images; with 10 classes it must give (2, 10)"),
            (nn.Linear(9, 10), {}, "cannot take an image of shape (1, 8, 8): "),
        ],
        ids=["channels", "classes", "no vector", "size"],
    )
    def test_refuses_a_backbone(self, backbone: nn.Module, task: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            classifier(backbone, **task)

    def test_takes_a_first_convolution_that_is_replaced(self) -> None:
        """DO-Conv's rule leaves the 1x1 convolutions alone: the first that is left takes 64 channels."""
        model = ImageClassifier("resnet50", conv="doconv", num_classes=10, channels=3, image_size=32)
        assert isinstance(model.backbone.conv1, DOConv2d)
        assert ImageClassifier(model.backbone, num_classes=10, channels=3, image_size=32)

    def test_refuses_an_image_that_is_too_small(self) -> None:
        with pytest.raises(ValueError, match=re.escape("the backbone cannot take an image of shape (3, 32, 32): ")):
            ImageClassifier("alexnet", num_classes=10, image_size=32)

    def test_refuses_an_image_of_a_size_that_the_network_asserts(self) -> None:
        network = VisionTransformer(32, 8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=10)
        assert ImageClassifier(network, num_classes=10, image_size=32)
        with pytest.raises(ValueError, match=re.escape("the backbone cannot take an image of shape (3, 64, 64): ")):
            ImageClassifier(network, num_classes=10, image_size=64)

    def test_refuses_a_network_that_gives_more_than_logits(self) -> None:
        class Two(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                return [x, x]

        with pytest.raises(ValueError, match="gives list for 2 images"):
            classifier(Two(1, 1))

    def test_needs_the_number_of_classes(self) -> None:
        with pytest.raises(ValueError, match="num_classes is not given, and there are no data to take it from"):
            ImageClassifier("cifar_resnet")


class TestConv:
    def test_by_dotted_path(self) -> None:
        model = ImageClassifier(static(), conv=f"{HERE}.Own", conv_args={"num_kernels": 3}, **TASK)
        assert type(model.backbone[3]) is Own
        assert len(model.backbone[3].weight) == 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"conv": "dynamc"},
                "conv='dynamc' does not exist, did you mean 'dynamic'? (choose one of ['compconv', 'condconv', ",
            ),
            ({"conv": "nowhere.Layer"}, "conv='nowhere.Layer' does not exist (there is no module 'nowhere'); choose "),
            ({"conv": f"{HERE}.Layer"}, f"conv='{HERE}.Layer' does not exist (the module '{HERE}' has no 'Layer')"),
            ({"conv": "dynamic", "conv_args": {"num_experts": 3}}, "num_experts"),
            ({"conv": "dynamic", "include": "nothing.*"}, "include='nothing.*' matches no convolution; there are 0, 3"),
        ],
        ids=str,
    )
    def test_refuses(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            classifier(static(), **options)


class TestWeights:
    @pytest.fixture
    def trained(self) -> ImageClassifier:
        model = classifier(randomize_norms_(static()))
        fit(model)
        return model.eval()

    @pytest.fixture
    def images(self) -> Tensor:
        return torch.randn(5, 1, 8, 8)

    @pytest.fixture(params=["state dict", "checkpoint"])
    def file(self, request: pytest.FixtureRequest, trained: ImageClassifier, tmp_path: Path) -> str:
        path = tmp_path / "weights.pt"
        if request.param == "state dict":
            torch.save(trained.backbone.state_dict(), path)
        else:
            trained.trainer.save_checkpoint(path)
        return str(path)

    def test_are_loaded(self, file: str, trained: ImageClassifier, images: Tensor) -> None:
        assert torch.equal(classifier(static(), weights=file).eval()(images), trained(images))

    @pytest.mark.parametrize("conv", ["dynamic", "condconv", f"{HERE}.Own"])
    def test_upcycling_keeps_the_logits(self, conv: str, file: str, trained: ImageClassifier, images: Tensor) -> None:
        upcycled = classifier(static(), weights=file, conv=conv, upcycle=True).eval()
        assert upcycled.conversion.replaced == ["3"]
        assert (upcycled(images) - trained(images)).abs().max() < 1e-5
        fresh = classifier(static(), weights=file, conv=conv).eval()
        assert (fresh(images) - trained(images)).abs().max() > 1e-3

    def test_of_a_network_with_a_part_called_backbone(self, tmp_path: Path, images: Tensor) -> None:
        """Its names start as those in a checkpoint of ours do."""
        network, path = Named().eval(), tmp_path / "weights.pt"
        torch.save(network.state_dict(), path)
        assert torch.equal(classifier(Named(), weights=str(path)).eval()(images), network(images))

    def test_refuses_a_missing_file(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "nowhere.pt")
        with pytest.raises(ValueError, match=re.escape(f"weights={missing!r} is no file")):
            classifier(static(), weights=missing)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"nonsense", ""),
            ({"0.weight": torch.zeros(4, 1, 3, 3)}, "Missing key"),
            (lambda: dynamic().state_dict(), "Unexpected key"),
            (lambda: head(nn.Conv2d(1, 4, 5), channels=6).state_dict(), "size mismatch"),
            ([1, 2], ""),
            (Path("a"), ""),
        ],
        ids=["no torch file", "missing", "another network", "another size", "a list", "a pickled object"],
    )
    def test_refuses_a_wrong_file(self, content: Any, message: str, tmp_path: Path) -> None:
        path = tmp_path / "weights.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content() if callable(content) else content, path)
        with pytest.raises(ValueError, match=f"(?s)weights={re.escape(repr(str(path)))}: .*{message}"):
            classifier(static(), weights=str(path))


class TestTemperatureWarning:
    def test_without_an_annealer(self) -> None:
        with warns_once("no TemperatureAnnealing is among the callbacks"):
            fit(classifier())

    @pytest.mark.parametrize("callbacks", [[constant()], [Callback(), TemperatureAnnealing()]], ids=["one", "two"])
    def test_none_with_one(self, callbacks: list[Callback]) -> None:
        fit(classifier(), None, *callbacks)  # a warning would be an error

    @pytest.mark.parametrize("layer", [nn.Conv2d(1, 6, 3), CondConv2d(1, 6, 3)], ids=["static", "condconv"])
    def test_none_without_a_temperature(self, layer: nn.Module) -> None:
        fit(classifier(head(layer, channels=6)))

    def test_a_users_own_layer(self) -> None:
        with warns_once("no TemperatureAnnealing is among the callbacks"):
            fit(classifier(head(Mixed(Constant(0.5, 0.5)), channels=1)))


class TestCheckpoint:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "backbone": "cifar_resnet",
        "backbone_args": {"depth": 8, "width": 4},
        "conv": "dynamic",
        "conv_args": {"num_kernels": 3},
        "include": ["layer*"],
        "optimizer": "AdamW",
        "optimizer_args": {"betas": [0.8, 0.9]},
        "scheduler": "StepLR",
        "scheduler_args": {"step_size": 1},
        "mixup": 0.1,
        "warmup_epochs": 1,
        **TASK,
    }

    def saved(self, model: ImageClassifier, path: Path) -> str:
        trainer = fit(model, None, TemperatureAnnealing(epochs=1), limit_val_batches=1)
        trainer.save_checkpoint(path / "a.ckpt")
        return str(path / "a.ckpt")

    def test_holds_nothing_but_numbers_and_tensors(self, tmp_path: Path) -> None:
        path = self.saved(ImageClassifier(**self.OPTIONS), tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        assert {name: checkpoint["hyper_parameters"][name] for name in self.OPTIONS} == self.OPTIONS

    def test_gives_the_same_logits(self, tmp_path: Path) -> None:
        model, images = ImageClassifier(**self.OPTIONS), torch.randn(3, 1, 8, 8)
        path = self.saved(model, tmp_path)
        loaded = ImageClassifier.load_from_checkpoint(path, map_location="cpu")
        assert torch.equal(loaded.eval()(images), model.eval()(images))
        assert loaded.backbone.layer1[0].conv1.router.temperature == 1

    def test_of_a_module_takes_the_module_again(self, tmp_path: Path) -> None:
        model, images = classifier(), torch.randn(3, 1, 8, 8)
        path = self.saved(model, tmp_path)
        assert "backbone" not in torch.load(path, weights_only=True)["hyper_parameters"]
        loaded = ImageClassifier.load_from_checkpoint(path, map_location="cpu", backbone=dynamic())
        assert torch.equal(loaded.eval()(images), model.eval()(images))

    def test_does_not_need_the_file_that_the_run_started_from(self, tmp_path: Path) -> None:
        start = tmp_path / "start.pt"
        torch.save(ImageClassifier(**self.OPTIONS | {"conv": "static"}).backbone.state_dict(), start)
        model, images = ImageClassifier(**self.OPTIONS, weights=str(start), upcycle=True), torch.randn(3, 1, 8, 8)
        path = self.saved(model, tmp_path)
        start.unlink()
        loaded = ImageClassifier.load_from_checkpoint(path, map_location="cpu")
        assert torch.equal(loaded.eval()(images), model.eval()(images))


class Draws(nn.Module):
    """Notes the random numbers that a network would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return x


class TestRandomNumbers:
    def drawn(self, **options: Any) -> list[float]:
        note = Draws()
        fit(classifier(head(note, channels=1)), **options)
        return note.drawn

    def expected(self, seed: int, epoch: int, batch: int, rank: int = 0) -> float:
        torch.manual_seed(derive_seed(seed, epoch, batch, rank))
        return torch.rand(()).item()

    def test_depend_on_seed_epoch_and_batch_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        drawn = self.drawn(max_epochs=2)
        assert drawn == [self.expected(5, epoch, batch) for epoch in range(2) for batch in range(4)]
        torch.manual_seed(1)
        assert self.drawn(max_epochs=2, limit_val_batches=2) == drawn

    def test_differ_between_seeds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "6")
        assert self.drawn() == [self.expected(6, 0, batch) for batch in range(4)]

    def test_differ_between_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        monkeypatch.setattr(ImageClassifier, "global_rank", 3)
        assert self.drawn() == [self.expected(5, 0, batch, rank=3) for batch in range(4)]

    def test_without_a_seed_they_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        drawn = self.drawn()
        assert all(first != second for first, second in pairwise(drawn))
        assert drawn != self.drawn()


class TestMeanLoss:
    def test_weighs_batches_by_their_images(self) -> None:
        mean = MeanLoss()
        for loss, count in ((1.0, 3), (4.0, 1), (0.5, 2)):
            mean.update(torch.tensor(loss), count)
        assert mean.compute().item() == pytest.approx((3 * 1.0 + 4.0 + 2 * 0.5) / 6)

    def test_nan_is_not_hidden(self) -> None:
        mean = MeanLoss()
        mean.update(torch.tensor(1.0), 2)
        mean.update(torch.tensor(float("nan")), 2)
        assert mean.compute().isnan()
