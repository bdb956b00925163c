"""``python -m dyn_lightning.evaluate --config RUN/config.yaml``: test a trained network under changed routing weights.

By default the five aggregation modes of ``routing.aggregation``; prints a table, and writes it as JSON.
"""

from inspect import signature
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.utilities import rank_zero_only

from dyn_lightning.ablation.inspection import ALL_MODES, Condition, Inspection, WholeBatches, check_resolutions
from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.cli import PROGRESS_BAR, CheckpointCLI
from dyn_lightning.errors import readable_errors
from dyn_lightning.record import Record
from dyn_lightning.routing import replaced

# Lightning's own sampler, by its newer and its older name.
SAMPLER = next(
    name for name in ("use_distributed_sampler", "replace_sampler_ddp") if name in signature(Trainer).parameters
)


class EvaluateCLI(CheckpointCLI):
    """Adds what the network is tested under.

    Attributes:
        output: the file that is written.
        inspection: what counts.
    """

    program = "dyn_lightning.evaluate"
    split = "test"
    output: Path
    inspection: Inspection

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the conditions, and where the result goes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--conditions",
            type=list[Condition] | None,
            default=None,
            help="What the routing weights become: a list of {mode, layers, resolutions, elsewhere, name}. Default: "
            "each mode in all layers.",
        )
        parser.add_argument("--draws", type=int, default=5, help="Of each condition that shuffles.")
        parser.add_argument("--shuffle_seed", type=int, default=0, help="Of the draws.")
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="A new file to write to. Default: `inspection.json` in the folder of the checkpoint's run.",
        )

    def find_checkpoint(self, root: Path) -> None:
        """Find the checkpoint, and a file for the result."""
        super().find_checkpoint(root)
        output = self.config.output
        self.output = self.run.unused("inspection.json") if output is None else Path(output)
        first = getattr(rank_zero_only, "rank", 0) == 0  # the others come when the file is made
        if first and self.output.exists():
            raise ValueError(f"--output {self.output}: it exists already, and nothing is overwritten")
        if not self.output.parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no folder {self.output.parent}")

    def trainer_options(self, callbacks: list[Callback]) -> dict[str, Any]:
        """Load the weights; nothing is logged, and the batches are dealt out by ``WholeBatches``."""
        self.parser.callback_keys.clear()
        self.load_weights()
        conditions = self.config_init.conditions or ALL_MODES
        self.inspection = Inspection(self.model, conditions, self.config.draws, self.config.shuffle_seed)
        return {
            "callbacks": [callback for callback in callbacks if isinstance(callback, PROGRESS_BAR)],
            "logger": False,
            "enable_checkpointing": False,
            "fast_dev_run": False,
            "limit_test_batches": 1.0,  # each image once, whatever the training left out
            SAMPLER: False,
        }


def main(args: list[str] | None = None) -> None:
    """Evaluate as the configuration says.

    Args:
        args: the command line, as a list; default is the program's own.
    """
    keep_freed_memory()
    with readable_errors():
        cli = EvaluateCLI(args)
        data, inspection = whole_batches(cli.datamodule, cli.config.split), cli.inspection
        data.check(inspection.conditions, cli.trainer.world_size)
        if cli.model.image_shape:
            check_resolutions(cli.model, inspection.conditions, cli.model.image_shape)
    trainer = cli.trainer
    facts = {
        "checkpoint": str(cli.checkpoint),
        "split": cli.config.split,
        "batch_size": data.batch_size,
        "draws": cli.config.draws,
        "shuffle_seed": cli.config.shuffle_seed,
    }
    path = cli.output if trainer.is_global_zero else None
    record = Record(path, trainer.strategy.root_device, trainer.world_size, **facts)
    with record, replaced(cli.model, inspection.change):
        trainer.test(inspection, data, verbose=False)
        record.facts["conditions"] = inspection.results()
    if trainer.is_global_zero:
        print(f"{table(inspection.results())}\nwritten: {cli.output}")


def whole_batches(data: LightningDataModule, split: str) -> WholeBatches:
    """Give the batches of a split of any data."""
    data.prepare_data()
    data.setup("test" if split == "test" else "validate")
    return WholeBatches(data.test_dataloader() if split == "test" else data.val_dataloader(), data)


def table(rows: list[dict[str, Any]]) -> str:
    """Make a table of the results, a row a condition."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  top-1 %   +-     top-5 %    loss"]
    for row in rows:
        top1, top5 = f"{100 * row['top1']:7.2f}", f"{100 * row['top5']:7.2f}"
        deviation = "" if row["top1_deviation"] is None else f"{100 * row['top1_deviation']:.2f}"
        lines.append(f"{row['name']:{width}}  {top1}  {deviation:>5}  {top5}  {row['loss']:6.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
