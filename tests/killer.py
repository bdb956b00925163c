import os
import signal
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer


class KillAt(Callback):
    """Kills the process, as a power cut would, before a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInTest(Callback):
    """Kills the process when it begins to test, unless a file says that it was done before."""

    def __init__(self, done: str) -> None:
        self.done = Path(done)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class FailAt(Callback):
    """Raises an error before a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("on purpose")
