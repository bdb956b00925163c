"""``python -m dyn_lightning.analyze --config exp.yaml --ckpt_path best``: show what a trained network's layers learned.

Writes PNG files, ``layers.csv``, ``run.json`` and ``index.html``, which opens without a network.
"""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities import rank_zero_only

from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.callbacks import ExpertExamples, GroupTracker, RoutingReport
from dyn_lightning.callbacks.default import default_observers
from dyn_lightning.callbacks.routing_observer import RoutingObserver
from dyn_lightning.cli import PROGRESS_BAR, CheckpointCLI
from dyn_lightning.errors import readable_errors
from dyn_lightning.page import Page
from dyn_lightning.protocols import Grouped, named_layers
from dyn_lightning.record import Record
from dyn_lightning.routing import named_routers

OBSERVERS = (RoutingReport, ExpertExamples, GroupTracker)


class AnalyzeCLI(CheckpointCLI):
    """Adds the folder of the analysis.

    Attributes:
        folder: of the analysis.
    """

    program = "dyn_lightning.analyze"
    split = "val"
    folder: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add where the result goes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="A new folder to write to. Default: `analysis` in the folder of the checkpoint's run.",
        )

    def find_checkpoint(self, root: Path) -> None:
        """Find what to analyse, and a folder for the result, without creating it."""
        super().find_checkpoint(root)
        output = self.config.output
        self.folder = self.run.unused("analysis") if output is None else Path(output)
        first = getattr(rank_zero_only, "rank", 0) == 0  # the others come when the folder is made
        if first and (self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir()))):
            raise ValueError(f"--output {self.folder}: it exists already, and nothing is overwritten")

    def claim_folder(self) -> None:
        """Create the folder; rank 0 does it for all."""
        super().claim_folder()
        limit = f"limit_{self.config.split}_batches"
        if self.config.trainer[limit] == 0:
            raise ValueError(f"trainer.{limit}=0 leaves nothing to look at: give --trainer.{limit} 1.0, or how many")
        if not named_routers(self.model) and not dict(named_layers(self.model, Grouped)):
            raise ValueError(
                "there is nothing to show: the model has no layer that routes images (routers()) or learns groups "
                "(membership())"
            )
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def give_folder_back(self) -> None:
        """Remove the folder."""
        self.folder.rmdir()

    def trainer_options(self, callbacks: list[Callback]) -> dict[str, Any]:
        """Load the weights, take the observers alone, and write what they say to a page."""
        self.parser.callback_keys.clear()
        split = self.config.split
        of_split = {type(callback) for callback in callbacks if getattr(callback, "split", None) == split}
        given = [
            callback
            for callback in callbacks
            if isinstance(callback, (*OBSERVERS, PROGRESS_BAR))
            and (getattr(callback, "split", split) == split or type(callback) not in of_split)
        ]
        observers = [each for each in default_observers(self.model, given) if isinstance(each, OBSERVERS)]
        states = self.load_weights().get("callbacks", {})  # a checkpoint of weights alone has none
        for callback in (*given, *observers):
            if isinstance(callback, RoutingObserver):
                callback.split, callback.prefix = split, ""
            if isinstance(callback, GroupTracker) and callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])
        layers = [*named_routers(self.model), *(name for name, _ in named_layers(self.model, Grouped))]
        page = Page(self.folder, f"What the layers of {self.config.name} learned", list(dict.fromkeys(layers)))
        return {"callbacks": [*given, *observers], "logger": page, "enable_checkpointing": False, "fast_dev_run": False}


def main(args: list[str] | None = None) -> None:
    """Analyse as the configuration says.

    Args:
        args: the command line, as a list; default is the program's own.
    """
    keep_freed_memory()
    with readable_errors():
        cli = AnalyzeCLI(args)
        trainer, path = cli.trainer, cli.folder / "run.json"
        facts = {"checkpoint": str(cli.checkpoint), "split": cli.config.split}
        record = Record(
            path if trainer.is_global_zero else None, trainer.strategy.root_device, trainer.world_size, **facts
        )
    with record:
        evaluate = trainer.validate if cli.config.split == "val" else trainer.test
        evaluate(cli.model, cli.datamodule, verbose=False)
        record.facts["metrics"] = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if isinstance(page := trainer.logger, Page) and trainer.is_global_zero:
        page.write({**facts, "device": record.facts["device"], "command": record.facts["command"]})
        print(f"page: {cli.folder / 'index.html'}")


if __name__ == "__main__":
    main()
