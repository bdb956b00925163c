"""What the entry points share: the command line, and what is built from it."""

import argparse
import csv
import os
import shutil
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.model_helpers import is_overridden

from dyn_lightning.callbacks.default import default_observers
from dyn_lightning.callbacks.routing_observer import SPLITS
from dyn_lightning.checks import unknown
from dyn_lightning.classifier import ImageClassifier
from dyn_lightning.errors import config_files, explain
from dyn_lightning.record import RunFolder

PROGRESS_BAR: Any = RichProgressBar.__base__  # its name is another in Lightning 1.9
# What a resumed optimizer and its schedule take from the checkpoint, whatever the configuration says.
FROM_CHECKPOINT = ("optimizer", "optimizer_args", "lr", "weight_decay", "scheduler", "scheduler_args")
# The numbers that a model takes from its data.
FROM_DATA = ("num_classes", "channels", "image_size")


class CLI(LightningCLI, ABC):
    """Parses the configuration, and builds data, model and trainer from it; an entry point says what comes in addition.

    Attributes:
        program: the module of the entry point.
        resumes: whether the optimizer goes on from the checkpoint too.
        checkpoint: to begin from, or None.
        step: the checkpoint's global step.
        elsewhere: whether another machine will run it, so that this one need not have its devices.
    """

    program: str
    resumes: bool
    elsewhere: bool = False
    checkpoint: Path | None = None
    step: int = 0

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            ImageClassifier,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=1,
            trainer_defaults={"default_root_dir": "runs", "max_epochs": 10},
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"python -m {self.program}"},
            auto_configure_optimizers=False,
            run=False,
            args=args,
        )

    @abstractmethod
    def find_checkpoint(self, root: Path) -> None:
        """Set ``checkpoint``, before anything is built; ``root`` is the folder of all runs."""

    @abstractmethod
    def claim_folder(self) -> None:
        """Create the folder that is written to, now that all but the trainer is known to be right."""

    @abstractmethod
    def give_folder_back(self) -> None:
        """Remove it again, because the trainer could not be built."""

    @abstractmethod
    def trainer_options(self, callbacks: list[Callback]) -> dict[str, Any]:
        """Give the trainer's options that differ from the configuration's, among them ``callbacks``, which start so."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what all entry points know, so that they take the same files."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run, which writes to runs/NAME/version_N. Default: that of the config file.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="A path, `last` or `best`. In fit, `last` goes on with the newest run of this name, in its folder; "
            "`best` (of the newest run) or a path start a new run from there.",
        )
        parser.add_argument(
            "--observe",
            type=bool,
            default=True,
            help="Whether to add the callbacks that show what the layers learn, but for those that the trainer has.",
        )
        # Two, because ModelCheckpoint's own `save_last` saves the last weights only when they are the best.
        parser.add_lightning_class_args(ModelCheckpoint, "best")
        parser.add_lightning_class_args(ModelCheckpoint, "last")
        parser.set_defaults(
            {
                "best.filename": "best-{epoch}",
                "best.monitor": "val/top1",
                "best.mode": "max",
                "last.filename": "last",
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and say what is wrong in a sentence."""
        try:
            super().parse_arguments(parser, args)
        except (argparse.ArgumentError, UnicodeDecodeError) as error:
            files = config_files(args if isinstance(args, list) else None)
            raise ValueError(explain(str(error), parser, files)) from error

    def before_instantiate_classes(self) -> None:
        """Name the run, find what to resume, and check what no class checks."""
        config = self.config
        for group in ("trainer", "model", "best", "last"):
            if not isinstance(config[group], Namespace):
                raise ValueError(f"{group}: {config[group]!r} is no mapping of keys")
        if config.name is None:
            config.name = "-".join(Path(str(path)).stem for path in config.config or []) or "fit"
        if not self.elsewhere:
            check_devices(config.trainer.accelerator, config.trainer.devices)
        for group in ("best", "last"):
            if config[group].dirpath is not None:
                raise ValueError(f"{group}.dirpath={config[group].dirpath}: checkpoints belong in the run's folder")
        self.find_checkpoint(Path(config.trainer.default_root_dir))

    def instantiate_classes(self) -> None:
        """Build the data, then the model with the data's numbers, then the trainer."""
        config = self.config
        self.datamodule = self.build_data()
        take_from_data(config.model, self.datamodule)
        self.config_init = self.parser.instantiate_classes(Namespace({**vars(config), "data": self.datamodule}))
        self.model = self.config_init.model
        logged = ["train/loss", "val/loss", *self.model.val_metrics]
        if config.best.monitor is not None and config.best.monitor not in logged:
            raise ValueError(f"best.monitor: {unknown(config.best.monitor, logged, 'metric')}")
        if self.checkpoint is not None:
            self.step = check_checkpoint(self.checkpoint, self.model, self.resumes)
        self.claim_folder()
        try:
            self.trainer = self._build_trainer()
        except Exception:
            self.give_folder_back()
            raise

    def build_data(self) -> LightningDataModule:
        """Build the data that the configuration says."""
        parser = LightningArgumentParser()
        parser.add_subclass_arguments(LightningDataModule, "data")
        return parser.instantiate_classes(Namespace(data=self.config.data)).data

    def _build_trainer(self) -> Trainer:
        trainer = self.config_init.trainer
        callbacks = trainer.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if trainer.enable_progress_bar is not False and not any(isinstance(bar, PROGRESS_BAR) for bar in callbacks):
            callbacks.append(RichProgressBar())
        if self.config.observe and trainer.logger is not False and not trainer.fast_dev_run:
            callbacks += default_observers(self.model, callbacks)
        return self.instantiate_trainer(**self.trainer_options(callbacks))


class CheckpointCLI(CLI):
    """Looks at a checkpoint without training it; an entry point says what is looked at.

    Attributes:
        split: whose images, ``val`` or ``test``, where the user says nothing.
        run: the folder of the checkpoint's run, or the current one if it is in none.
    """

    resumes = False
    split: str
    run: RunFolder

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is looked at."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--split", type=str, default=self.split, help="Whose images to look at: val or test.")

    def find_checkpoint(self, root: Path) -> None:
        """Find the checkpoint, by default the best one of the run."""
        if self.config.split not in SPLITS:
            raise ValueError(f"--split {self.config.split} does not exist, choose one of {', '.join(SPLITS)}")
        which = self.config.ckpt_path or "best"
        self.checkpoint = self._newest(root).checkpoint(which) if which in ("last", "best") else Path(which)
        of_a_run = self.checkpoint.parent.name == "checkpoints"
        self.run = RunFolder(self.checkpoint.parent.parent if of_a_run else Path())

    def claim_folder(self) -> None:
        """Check that there is something to look at."""
        if self.config.split == "test" and not has_test_split(self.datamodule):
            raise ValueError(f"--split test: the data ({type(self.datamodule).__name__}) have none, choose val")

    def give_folder_back(self) -> None:
        """Leave everything as it is: nothing was made."""

    def load_weights(self) -> dict[str, Any]:
        """Load the checkpoint into the model, and give all that it holds."""
        assert self.checkpoint is not None
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(saved["state_dict"])
        return saved

    def _newest(self, root: Path) -> RunFolder:
        """Find the run that the configuration file lies in, or else the newest of its name."""
        for path in reversed(self.config.config or []):
            run = RunFolder(Path(str(path)).parent)
            if run.last() is not None:
                return run
        return RunFolder.newest(root, self.config.name)


def has_test_split(data: LightningDataModule) -> bool:
    """Say whether the data can be tested on."""
    return is_overridden("test_dataloader", data, LightningDataModule) and getattr(data, "test_set", True) is not None


def take_from_data(model: Namespace, data: LightningDataModule) -> None:
    """Give the model the data's numbers, where the user gave none.

    Raises:
        ValueError: the user gave another number than the data have.
    """
    for name in FROM_DATA:
        has, wants = getattr(data, name, None), model.get(name)
        if has is not None and wants is not None and has != wants:
            raise ValueError(
                f"model.{name}={wants}, but the data ({type(data).__name__}) have {name}={has}: "
                f"leave model.{name} out, and it is taken from the data"
            )
        model[name] = wants if has is None else has


def check_devices(accelerator: str, devices: int | str | list[int]) -> None:
    """Check that this machine has as many processors as processes are asked for; Lightning checks the other devices.

    Raises:
        ValueError: it has fewer.
    """
    wanted = int(str(devices)) if str(devices).isdigit() else 0
    cores = os.cpu_count() or 1
    if (accelerator == "cpu" or not torch.cuda.is_available()) and accelerator in ("cpu", "auto") and wanted > cores:
        raise ValueError(f"trainer.devices={devices}: this machine has {cores} processor cores and no other device")


def check_checkpoint(path: Path, model: LightningModule, resume: bool = True) -> int:
    """Check that a checkpoint is whole and holds this model's weights, to resume trained by the same optimizer.

    Returns:
        Its global step.

    Raises:
        ValueError: it is missing, unreadable, or of another model.
    """
    if not path.is_file():
        raise ValueError(f"--ckpt_path {path}: there is no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:
        raise ValueError(f"--ckpt_path {path} is no whole checkpoint: {type(error).__name__}: {error}") from error
    trained = checkpoint.get("hyper_parameters", {})
    for name in FROM_CHECKPOINT:
        if resume and name in trained and trained[name] != model.hparams[name]:
            raise ValueError(
                f"model.{name}={model.hparams[name]}, but --ckpt_path {path} was trained with {trained[name]}, and a "
                "resumed optimizer goes on as it was: change it back"
            )
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in saved.items()}
    if ours == theirs:
        return step
    problems = {
        "only in the checkpoint": [name for name in theirs if name not in ours],
        "only in the model": [name for name in ours if name not in theirs],
        "of another shape": [
            f"{name} {theirs[name]} (model: {ours[name]})"
            for name in ours
            if ours[name] != theirs.get(name, ours[name])
        ],
    }
    differ = "; ".join(
        f"{kind}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for kind, names in problems.items()
        if names
    )
    raise ValueError(f"--ckpt_path {path} is of another model. {differ}")


def keep_metrics(logger: CSVLogger, step: int) -> None:
    """Start ``metrics.csv``, with the rows before ``step`` that a resumed run has, which the logger would delete.

    The old file stays as ``metrics-1.csv``, and ``hparams.yaml`` likewise.
    """
    folder, rows = RunFolder(Path(logger.log_dir)), []
    path, hparams = folder.path / "metrics.csv", folder.path / "hparams.yaml"
    if hparams.is_file():
        shutil.copy(hparams, folder.unused(hparams.name))
    if path.is_file():
        old = folder.unused(path.name)
        shutil.copy(path, old)
        with old.open(newline="", encoding="utf8") as file:
            lines = [line for line in file if line.endswith("\n")]  # not one that was cut short by a kill
        rows = [row for row in csv.DictReader(lines) if int(row["step"]) < step]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        logger.experiment  # noqa: B018 - created here, it deletes the old file
    for row in rows:
        at = int(row.pop("step"))
        metrics: dict[str, Any] = {
            name: int(value) if value.isdigit() else float(value) for name, value in row.items() if value
        }
        logger.log_metrics(metrics, step=at)
    logger.save()
