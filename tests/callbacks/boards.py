"""Reads back what a training wrote to TensorBoard, and catches figures before they are drawn."""

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dyn_lightning.callbacks import TemperatureAnnealing, expert_examples, group_tracker, routing_report
from tests.training import fit


def train(model: LightningModule, data: Any, folder: Any, *callbacks: Callback, **options: Any) -> Trainer:
    """Train with validation, one epoch of four steps, and write to TensorBoard."""
    defaults = {"logger": TensorBoardLogger(folder), "limit_val_batches": 1.0}
    return fit(model, data, *callbacks, **{**defaults, **options})


def constant() -> TemperatureAnnealing:
    return TemperatureAnnealing(schedule="constant", start=7)


def board(trainer: Trainer) -> EventAccumulator:
    sizes = {"histograms": 0, "scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(trainer.loggers[0].log_dir, size_guidance=sizes).Reload()


def scalars(trainer: Trainer) -> dict[str, dict[int, float]]:
    """Give values by tag and step; a step that is written twice is an error."""
    read = board(trainer)
    found = {}
    for tag in set(read.Tags()["scalars"]) - {"epoch", "hp_metric"}:  # Lightning's own
        events = read.Scalars(tag)
        found[tag] = {event.step: event.value for event in events}
        assert len(found[tag]) == len(events), f"{tag}: {[event.step for event in events]}"
    return found


def pictures(trainer: Trainer) -> dict[str, list[int]]:
    """Give the steps of each picture."""
    read = board(trainer)
    return {tag: [event.step for event in read.Images(tag)] for tag in read.Tags()["images"]}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by tag, as they are handed to the loggers."""
    found: dict[str, Figure] = {}

    def catching(log_figure: Callable[..., None]) -> Callable[..., None]:
        def log(trainer: Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
            found[tag] = figure = draw()
            log_figure(trainer, tag, lambda: figure, step)

        return log

    for where in (routing_report, expert_examples, group_tracker):
        monkeypatch.setattr(where, "log_figure", catching(where.log_figure))
    return found


def texts(figure: Figure) -> str:
    """Give all that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
