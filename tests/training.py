"""Short trainings in the process of the test, and the small networks that they train."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor, nn

from dyn_lightning.classifier import ImageClassifier
from dyn_lightning.data import Digits
from dyn_lightning.layers import DynamicConv2d


def fit(
    model: ImageClassifier, data: Any = None, *callbacks: Callback, ckpt_path: str | None = None, **options: Any
) -> Trainer:
    """Train on the CPU and write nothing: one epoch of four steps on 8 px digits, unless told otherwise."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": 4,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{**defaults, **options}, callbacks=list(callbacks))
    trainer.fit(model, data or digits(), ckpt_path=ckpt_path)
    return trainer


@contextmanager
def warns_once(text: str) -> Iterator[None]:
    """Expect one warning with this text; others stay what the suite makes of them, which pytest.warns would change."""
    with warnings.catch_warnings(record=True) as record:
        warnings.filterwarnings("always", message=f".*{re.escape(text)}")
        yield
    assert [text in str(warning.message) for warning in record] == [True]


def digits(batch_size: int = 16) -> Digits:
    return Digits(image_size=8, batch_size=batch_size)


def classifier(backbone: nn.Module | None = None, **options: Any) -> ImageClassifier:
    """Classify 8 px digits with ``backbone``, by default one with two dynamic convolutions."""
    return ImageClassifier(dynamic() if backbone is None else backbone, **{**TASK, **options})


TASK = {"num_classes": 10, "channels": 1, "image_size": 8}


def dynamic() -> nn.Sequential:
    """Layers 0 and 2 are dynamic, with 3 and 2 kernels."""
    return head(
        DynamicConv2d(1, 4, 3, padding=1, num_kernels=3), nn.ReLU(), DynamicConv2d(4, 6, 3, num_kernels=2), channels=6
    )


def static() -> nn.Sequential:
    return head(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), channels=6)


def head(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Constant(nn.Module):
    """Gives each sample these routing weights."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.expand(len(x), -1)


class Mixed(nn.Module):
    """A user's own layer, routed and annealed: it mixes scalings of its input, and notes each temperature it sees."""

    def __init__(self, router: nn.Module, kernels: int = 2) -> None:
        super().__init__()
        self.router = router
        self.scales = nn.Parameter(torch.rand(kernels))
        self.register_buffer("temperature", torch.tensor(7.0))
        self.seen: dict[bool, list[float]] = {True: [], False: []}

    def routers(self) -> dict[str, nn.Module]:
        return {"router": self.router}

    def set_temperature(self, value: float) -> None:
        self.temperature.fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        self.seen[self.training].append(self.temperature.item())
        return x * (self.router(x).nan_to_num(0, 0, 0) @ self.scales)[:, None, None, None]


class Batches(Callback):
    """Notes the images and labels of each training step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(tuple(batch))


class Raise(Callback):
    """Ends the training with an error, in the middle of a step."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("on purpose")
