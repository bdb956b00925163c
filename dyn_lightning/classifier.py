"""ImageClassifier: trains any backbone, with any of the layers, to classify images."""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from dyn_lightning.callbacks import TemperatureAnnealing
from dyn_lightning.convert import ConversionReport, convert, resolve_conv
from dyn_lightning.cost import empty_images, evaluating
from dyn_lightning.data.module import derive_seed
from dyn_lightning.layers import CONVS
from dyn_lightning.models.backbone import UnknownNameError, build_backbone, import_object, load_weights
from dyn_lightning.protocols import Annealed, Grouped
from dyn_lightning.recipe import group_complexity, over_budget, parameter_groups, warmup_cosine
from dyn_lightning.rules import first_convolution


class MeanLoss(Metric):
    """The mean of a loss over all images of all ranks; a loss that is NaN makes it NaN.

    Lightning's own mean is wrong where ranks have different numbers of images, torchmetrics' leaves NaN out.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: int) -> None:
        """Add the mean loss of ``count`` images."""
        self.total += loss * count
        self.count += count

    def compute(self) -> Tensor:
        """Give the mean."""
        return self.total / self.count


class ImageClassifier(LightningModule):
    """Any backbone, its convolutions replaced by a layer from a paper, trained with cross entropy.

    Logs ``train/loss``, ``train/lr`` and, for ``val`` and ``test``, ``loss``, ``top1`` and ``top5`` (top-5 where there
    are more than five classes), right under DDP. The random numbers of a step (dropout, mixup) depend on the seed, the
    epoch, the batch and the rank alone, so a resumed run draws the same ones.

    Args:
        backbone: a name in ``MODELS``, of torchvision or timm, a dotted path, or a module that is already built.
        backbone_args: the backbone's own options, as ``{width_mult: 0.5}``, ``{weights: DEFAULT}`` (torchvision),
            ``{pretrained: true}`` (timm).
        weights: file with the weights of the backbone before conversion: its state dict, or a checkpoint of a run with
            ``conv: static``. Loaded strictly.
        conv: a name in ``CONVS`` or the dotted path of a layer; ``static`` leaves the backbone as it is.
        conv_args: the layer's own options, as ``{num_kernels: 4}``, and those of ``convert``, as ``{share: block}``;
            not looked at with ``conv: static``.
        include: which convolutions to replace, globs over module names; default is the paper's rule (see ``convert``).
        exclude: which of those to leave.
        upcycle: start from the backbone's weights, so that a trained network's output is kept.
        num_classes: classes; ``fit`` takes the data's.
        channels: of the images; ``fit`` takes the data's, else 3.
        image_size: rows and columns; ``fit`` takes the data's. Where known, the backbone is tried at once.
        optimizer: a class in ``torch.optim``, or a dotted path.
        optimizer_args: its options beside ``lr`` and ``weight_decay``, as ``{momentum: 0.9}``.
        lr: learning rate.
        weight_decay: not applied to norms, biases, routers and gates.
        scheduler: a class in ``torch.optim.lr_scheduler``, or a dotted path; default is a linear warm-up over
            ``warmup_epochs`` and then half a cosine to 0, step by step.
        scheduler_args: its options; given schedulers are stepped every epoch.
        warmup_epochs: of the default schedule.
        label_smoothing: of the cross entropy in training, from 0 to 1.
        mixup: alpha of mixup (arXiv 1710.09412), 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899), 0 is off; with both on, each batch takes one at random.
        group_budget: b, for layers that learn their groups (DGConv): the loss is multiplied by
            ``(complexity / budget) ** 0.02`` while the connected pairs of channels are more than the budget, all pairs
            divided by b (32 in the paper's ResNeXt-50). None is off.

    Shape:
        ``(B, channels, H, W)`` to ``(B, num_classes)``.

    Raises:
        ValueError: a name that does not exist, options that are refused, or a backbone that cannot take the images or
            does not give ``num_classes`` numbers.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        conv: str = "static",
        conv_args: dict[str, Any] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        upcycle: bool = False,
        num_classes: int | None = None,
        channels: int | None = None,
        image_size: int | None = None,
        optimizer: str = "SGD",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        scheduler: str | None = None,
        scheduler_args: dict[str, Any] | None = None,
        warmup_epochs: float = 0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        group_budget: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else [])
        channels = 3 if channels is None else channels
        if num_classes is None:
            raise ValueError("num_classes is not given, and there are no data to take it from")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be from 0 to 1")
        for name in ("lr", "weight_decay", "warmup_epochs", "mixup", "cutmix"):
            value = self.hparams[name]
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number, 0 or more")
        if isinstance(backbone, str):
            backbone = build_backbone(backbone, num_classes, channels, **(backbone_args or {}))
        if weights is not None:
            load_weights(backbone, weights)
        if image_size is not None:
            _check_channels(backbone, channels)
        self.conversion: ConversionReport | None = None
        if conv != "static":
            layer = _resolve_conv(conv)
            twice = {"include", "exclude", "upcycle"} & set(conv_args or {})
            if twice:
                raise ValueError(f"conv_args has {sorted(twice)}: give model.{min(twice)} instead")
            self.conversion = convert(
                backbone, layer, include=include, exclude=exclude, upcycle=upcycle, **(conv_args or {})
            )
        self.backbone = backbone
        if group_budget is not None:
            _check_group_budget(group_budget, backbone)
        if image_size is not None:
            _try_backbone(backbone, (channels, image_size, image_size), num_classes)
        self._make_scheduler(self._make_optimizer())  # refuses wrong names and options now, not when training starts
        self.mix = _mixer(mixup, cutmix, num_classes)
        self.val_metrics, self.val_loss = _metrics(num_classes, "val/"), MeanLoss()
        self.test_metrics, self.test_loss = _metrics(num_classes, "test/"), MeanLoss()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """``(C, H, W)`` of the images; None if their size is not known."""
        size = self.hparams["image_size"]
        return (self.hparams["channels"] or 3, size, size) if size else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the file of the initial weights: the checkpoint can be loaded without it."""
        checkpoint["hyper_parameters"]["weights"] = None

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits."""
        return self.backbone(images)

    def on_fit_start(self) -> None:
        """Warn when nothing anneals the temperature of layers that have one."""
        annealed = any(isinstance(module, Annealed) for module in self.modules())
        if annealed and not any(isinstance(callback, TemperatureAnnealing) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "The model's softmax temperature stays as it is: no TemperatureAnnealing is among the callbacks. The "
                "paper anneals it from 30 to 1; add `trainer.callbacks: [{class_path: TemperatureAnnealing}]`, with "
                "`init_args: {schedule: constant, start: T}` to hold it at T on purpose."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random numbers of this step."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        if seed is not None:
            torch.manual_seed(derive_seed(int(seed), self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Give the loss of a batch."""
        images, labels = batch if self.mix is None else self.mix(*batch)
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.hparams["label_smoothing"])
        if self.hparams["group_budget"] is not None:
            complexity = group_complexity(self.backbone, self.hparams["group_budget"])
            loss = loss * over_budget(complexity)
            self.log("train/complexity", complexity.detach())
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(images))
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self.log("val/loss", self._evaluate(batch, self.val_metrics, self.val_loss))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self.log("test/loss", self._evaluate(batch, self.test_metrics, self.test_loss))

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, loss: MeanLoss) -> MeanLoss:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels), len(images))
        self.log_dict(metrics, prog_bar=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule."""
        optimizer = self._make_optimizer()
        scheduler = self._make_scheduler(optimizer)
        if scheduler is None:
            total, warmup = self._steps()
            scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]
        monitor = {"monitor": "val/loss"} if isinstance(scheduler, ReduceLROnPlateau) else {}
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch", **monitor}]

    def _steps(self) -> tuple[float, float]:
        """Count the steps of the whole training and of the warm-up."""
        trainer = self.trainer
        total = trainer.estimated_stepping_batches
        if not 0 < total < math.inf:
            raise ValueError(
                f"the cosine needs an end, but max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps} give "
                f"{total} steps: set one of them, or model.scheduler"
            )
        if not math.isfinite(trainer.num_training_batches):  # not loaded yet, as only max_steps is given
            load: Any = getattr(trainer.fit_loop, "setup_data", None) or getattr(
                trainer, "reset_train_dataloader", None
            )
            load()  # named so in Lightning 2 and 1.9
        epochs = self.hparams["warmup_epochs"]
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if epochs else 0
        return total, epochs * steps

    def _make_optimizer(self) -> Optimizer:
        hparams = self.hparams
        make = _resolve("optimizer", hparams["optimizer"], torch.optim)
        groups = parameter_groups(self.backbone, hparams["weight_decay"])
        options = {"lr": hparams["lr"], "weight_decay": hparams["weight_decay"]} | (hparams["optimizer_args"] or {})
        try:
            return make(groups, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optimizer={hparams['optimizer']!r} with {hparams['optimizer_args']}: {error}") from error

    def _make_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        name, options = self.hparams["scheduler"], self.hparams["scheduler_args"] or {}
        if name is None:
            return None
        make = _resolve("scheduler", name, torch.optim.lr_scheduler)
        try:
            return make(optimizer, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"scheduler={name!r} with {options}: {error}") from error


def _check_group_budget(divisor: float, backbone: nn.Module) -> None:
    if not isinstance(divisor, (int, float)) or not 1 <= divisor < math.inf:
        raise ValueError(f"group_budget={divisor} must be a finite number, 1 or more: all pairs of channels / that")
    if not any(isinstance(module, Grouped) for module in backbone.modules()):
        raise ValueError(
            f"group_budget={divisor} needs layers that learn their groups, and the model has none: set conv: dgconv"
        )


def _check_channels(backbone: nn.Module, channels: int) -> None:
    name = first_convolution(backbone)
    takes: Any = backbone.get_submodule(name).in_channels if name else channels
    if takes != channels:
        raise ValueError(
            f"the backbone's first convolution {name!r} takes {takes} channels, but the images have {channels}"
        )


def _try_backbone(backbone: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Run two empty images through the backbone, so that what does not fit is said before training."""
    try:
        with evaluating(backbone), torch.no_grad():
            output = backbone(empty_images(backbone, 2, shape))
    except Exception as error:
        raise ValueError(f"the backbone cannot take an image of shape {shape}: {error}") from error
    if not isinstance(output, Tensor) or output.shape != (2, num_classes):
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the backbone gives {given} for 2 images; with {num_classes} classes it must give (2, {num_classes})"
        )


def _resolve_conv(name: str) -> Any:
    if "." not in name:
        return resolve_conv(name)
    try:
        return import_object(name)
    except UnknownNameError as error:
        raise ValueError(f"conv={name!r} does not exist ({error}); choose one of {sorted(CONVS)} or a path") from error


def _resolve(argument: str, name: str, module: Any) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    try:
        return import_object(name)
    except UnknownNameError as error:
        names = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
        raise ValueError(
            f"{argument}={name!r} does not exist ({error}); {module.__name__} has {', '.join(names)}"
        ) from error


def _mixer(mixup: float, cutmix: float, num_classes: int) -> nn.Module | None:
    mixers = [mixer(alpha=a, num_classes=num_classes) for mixer, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
    return v2.RandomChoice(mixers) if mixers else None


def _metrics(num_classes: int, prefix: str) -> MetricCollection:
    ks = (1, 5) if num_classes > 5 else (1,)
    return MetricCollection(
        {f"top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in ks},
        prefix=prefix,
        compute_groups=False,
    )
