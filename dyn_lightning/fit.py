"""``python -m dyn_lightning.fit --config exp.yaml``: train, then test the best checkpoint."""

import os
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from dyn_lightning.cli import CLI, keep_metrics, readable_errors
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.record import Record


def main(args: list[str] | None = None) -> None:
    """Train as the configuration says.

    Args:
        args: the command line, as a list; default is the program's own.
    """
    with readable_errors():
        cli = CLI(args)
        record = prepare(cli)
    trainer = cli.trainer
    with record:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=str(cli.checkpoint) if cli.checkpoint else None)
        metrics = dict(trainer.callback_metrics)
        best = best_checkpoint(trainer.checkpoint_callback)
        if getattr(cli.datamodule, "test_set", None) is not None:
            trainer.test(cli.model, cli.datamodule, ckpt_path=best, verbose=False)
            metrics |= trainer.callback_metrics
        record.facts |= {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "best_checkpoint": best,
            "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        }
    if trainer.is_global_zero:
        print(summary(cli, record))


def prepare(cli: CLI) -> Record:
    """Create the run's folder and its record."""
    hparams = cli.model.hparams
    shape = (hparams["channels"] or 3, hparams["image_size"], hparams["image_size"])
    facts: dict[str, Any] = {
        "seed": cli.config.seed_everything,
        "resumed_from": str(cli.checkpoint) if cli.checkpoint else None,
        "parameters": parameters(cli.model),
        "multiply_adds": multiply_adds(cli.model, shape) if hparams["image_size"] else None,
    }
    path = None
    if cli.folder is not None and cli.trainer.is_global_zero:
        # Taken only now: a start that failed before leaves nothing behind.
        cli.folder.path.mkdir(parents=True, exist_ok=cli.config.ckpt_path == "last")
        for logger in cli.trainer.loggers:
            if isinstance(logger, CSVLogger):
                keep_metrics(logger, cli.step)
        cli.save_config()
        path = cli.folder.unused("run.json")
        print(f"run folder: {cli.folder.path}", flush=True)
        if cli.model.conversion is not None:
            print(f"{cli.model.hparams['conv']}: {cli.model.conversion.summary()}", flush=True)
    return Record(path, cli.trainer.world_size, **facts)


def best_checkpoint(callback: Any) -> str | None:
    """Give the best checkpoint's path, or None: the weights as they are."""
    if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
        return callback.best_model_path
    return None


def summary(cli: CLI, record: Record) -> str:
    """Say where everything is, and how it went."""
    facts = record.facts
    best = facts["best_checkpoint"]
    lines = {
        "run folder": cli.folder.path if cli.folder else "none (fast_dev_run)",
        "best checkpoint": os.path.relpath(best) if best else "none",
        "seconds": f"{facts['seconds']:.1f}",
        **{name: f"{value:.4f}" for name, value in facts["metrics"].items() if name.startswith(("val/", "test/"))},
    }
    width = max(map(len, lines))
    return "\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


if __name__ == "__main__":
    main()
