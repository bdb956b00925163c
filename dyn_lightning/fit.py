"""``python -m dyn_lightning.fit --config exp.yaml``: train, then test the best checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.cli import CLI, has_test_split, keep_metrics
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.errors import readable_errors
from dyn_lightning.record import Record, RunFolder, write_whole

# TensorBoard's events that may wait to be written; with more, training waits too. A step may have hundreds.
EVENTS = 1000


class FitCLI(CLI):
    """Adds the folder of the run.

    Attributes:
        folder: of this run; None with ``fast_dev_run``, which leaves nothing.
    """

    program = "dyn_lightning.fit"
    resumes = True
    folder: RunFolder | None = None

    def find_checkpoint(self, root: Path) -> None:
        """Find what to resume, and the run's folder, without creating it."""
        config, run = self.config, None
        if config.ckpt_path in ("last", "best"):
            run = RunFolder.newest(root, config.name)
            self.checkpoint = run.checkpoint(config.ckpt_path)
        elif config.ckpt_path is not None:
            self.checkpoint = Path(config.ckpt_path)
        if not config.trainer.fast_dev_run:
            self.folder = run if config.ckpt_path == "last" else RunFolder.new(root, config.name)

    def claim_folder(self) -> None:
        """Create the run's folder; rank 0 does it for all."""
        if self.folder is None:
            return
        if getattr(rank_zero_only, "rank", 0) == 0 and self.config.ckpt_path != "last":
            self.folder = self.folder.claim()
        for checkpoint in (self.config_init.best, self.config_init.last):
            checkpoint.dirpath = str(self.folder.checkpoints.absolute())

    def give_folder_back(self) -> None:
        """Remove the run's folder."""
        if self.folder is not None:
            self.folder.give_back()

    def trainer_options(self, callbacks: list[Callback]) -> dict[str, Any]:
        """Choose loggers where the user chose none."""
        trainer = self.config_init.trainer
        if trainer.enable_checkpointing is False or self.folder is None:
            self.parser.callback_keys.clear()
        if self.folder is None or trainer.logger not in (None, True):
            return {"callbacks": callbacks}
        path = self.folder.path
        place: dict[str, Any] = {"save_dir": path.parent.parent, "name": path.parent.name, "version": path.name}
        # What was logged after the checkpoint will be logged again.
        resumed = self.step or None
        board = TensorBoardLogger(**place, default_hp_metric=False, purge_step=resumed, max_queue=EVENTS)
        return {"callbacks": callbacks, "logger": [board, CSVLogger(**place, flush_logs_every_n_steps=1)]}

    def save_config(self) -> None:
        """Write the resolved configuration to the run's folder, beside those of earlier starts."""
        if self.folder is None:
            return
        config = self.config.clone()
        config.config = config.ckpt_path = None
        text = self.parser.dump(config, skip_none=False)
        write_whole(self.folder.unused("config.yaml"), text.encode())


def main(args: list[str] | None = None) -> None:
    """Train as the configuration says.

    Args:
        args: the command line, as a list; default is the program's own.
    """
    keep_freed_memory()
    with readable_errors():
        cli = FitCLI(args)
        record = prepare(cli)
    trainer, best = cli.trainer, cli.config_init.best
    with readable_errors(lambda: trainer.global_step > cli.step), record:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=str(cli.checkpoint) if cli.checkpoint else None)
        save_last(cli)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        record.facts["metrics"] = metrics
        record.write()  # from here on a resume has nothing left to train, and would not know them
        if has_test_split(cli.datamodule):
            trainer.test(cli.model, cli.datamodule, ckpt_path=best.best_model_path or None, verbose=False)
            metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        record.facts |= {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "best_checkpoint": best.best_model_path or None,
            "best_score": None if best.best_model_score is None else float(best.best_model_score),
            "metrics": dict(sorted(metrics.items())),
        }
    if trainer.is_global_zero:
        print(summary(cli, record))


def prepare(cli: FitCLI) -> Record:
    """Fill the run's folder, and begin its record."""
    shape = cli.model.image_shape
    facts: dict[str, Any] = {
        "seed": cli.config.seed_everything,
        "resumed_from": str(cli.checkpoint) if cli.checkpoint else None,
        "parameters": parameters(cli.model),
        "multiply_adds": multiply_adds(cli.model, shape) if shape else None,
    }
    path = None
    if cli.folder is not None and cli.trainer.is_global_zero:
        for logger in cli.trainer.loggers:
            if isinstance(logger, CSVLogger):
                keep_metrics(logger, cli.step)
        cli.save_config()
        path = cli.folder.unused("run.json")
        print(f"run folder: {cli.folder.path}", flush=True)
        if cli.model.conversion is not None:
            print(f"{cli.model.hparams['conv']}: {cli.model.conversion.summary()}", flush=True)
    return Record(path, cli.trainer.strategy.root_device, cli.trainer.world_size, **facts)


def save_last(cli: FitCLI) -> None:
    """Save the final weights, where the last checkpoint was saved some steps before the end."""
    trainer, path, stale = cli.trainer, cli.config_init.last.best_model_path, False
    if path and trainer.is_global_zero:
        stale = torch.load(path, weights_only=True, mmap=True)["global_step"] != trainer.global_step
    # Rank 0 decides for all: saving is a collective, and another rank may read the file when it is already new.
    if trainer.strategy.broadcast(stale):
        trainer.save_checkpoint(path)


def summary(cli: FitCLI, record: Record) -> str:
    """Say where everything is, and how it went; what is tested is the best checkpoint."""
    facts, monitor = record.facts, cli.config.best.monitor
    best = facts["best_checkpoint"]
    lines = {
        "run folder": cli.folder.path if cli.folder else "none (fast_dev_run)",
        "best checkpoint": os.path.relpath(best) if best else "none",
        **({f"its {monitor}": f"{facts['best_score']:.4f}"} if best else {}),
        **{name: f"{value:.4f}" for name, value in facts["metrics"].items() if name.startswith("test/")},
        "seconds": f"{facts['seconds']:.1f}",
    }
    width = max(map(len, lines))
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


if __name__ == "__main__":
    main()
