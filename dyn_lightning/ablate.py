"""``python -m dyn_lightning.ablate --config STUDY.yaml``: train and evaluate what a study compares, and report it."""

import argparse
import dataclasses
import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning import Callback, LightningDataModule
from rich.console import Console
from rich.markup import escape

from dyn_lightning.ablation.harness import Display, Pairs, StudyFolder, duration, run, seconds_a_cell
from dyn_lightning.ablation.inspection import Inspection, check_resolutions
from dyn_lightning.ablation.launch import Launcher, Local
from dyn_lightning.ablation.report import write_report
from dyn_lightning.ablation.results import gather
from dyn_lightning.ablation.slurm import Slurm
from dyn_lightning.ablation.study import Cell, Study, digest
from dyn_lightning.checks import unknown
from dyn_lightning.cli import has_test_split
from dyn_lightning.cost import multiply_adds, parameters
from dyn_lightning.errors import config_files, explain, first_error, readable_errors
from dyn_lightning.evaluate import whole_batches
from dyn_lightning.fit import FitCLI

# What does not decide a cell's result.
ASIDE = ("config", "ckpt_path", "name")
# What each cell has of its own.
NOT_OF_ARMS = ("seed_everything", "name", "ckpt_path")


class CellCLI(FitCLI):
    """Builds everything that ``fit`` would train, without a folder, to see that it can."""

    program = "dyn_lightning.ablate"
    known: dict[str, LightningDataModule] = {}  # noqa: RUF012 - one for all on purpose: reading data may take long

    def find_checkpoint(self, root: Path) -> None:
        """Start from nothing.

        Raises:
            ValueError: the configuration names a checkpoint.
        """
        if self.config.ckpt_path is not None:
            raise ValueError(f"ckpt_path={self.config.ckpt_path}: cells start from nothing (model.weights may not)")

    def build_data(self) -> LightningDataModule:
        """Take the same data for all arms that have the same configuration of them."""
        key = digest(yaml.safe_load(self.parser.dump(self.config))["data"])
        if key not in self.known:
            self.known[key] = super().build_data()
        return self.known[key]

    def trainer_options(self, callbacks: list[Callback]) -> dict[str, Any]:
        """Build the trainer for this machine, whatever the one has that will run it."""
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": 32}
        return {**super().trainer_options(callbacks), **(here if self.elsewhere else {})}

    def plain(self) -> dict[str, Any]:
        """Give the resolved configuration, without what each cell has for itself."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        config["trainer"]["default_root_dir"] = None
        return {key: value for key, value in config.items() if key not in ASIDE}


class CellElsewhereCLI(CellCLI):
    """The same, for another machine to run."""

    elsewhere = True


def parse(args: list[str] | None) -> tuple[Any, Study, Path, bool]:
    """Read the command line: the options, the study, its file, and whether its base is the one that the file names.

    Raises:
        ValueError: something is wrong in the file or the options.
    """
    parser = ArgumentParser(prog="python -m dyn_lightning.ablate", exit_on_error=False, description=__doc__)
    parser.add_argument("--config", action="config", required=True, help="The study: a YAML file.")
    parser.add_class_arguments(Study, skip={"seeds"})
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Each arm is trained once with each.")
    parser.add_argument("--only", type=str, nargs="+", metavar="ARM", help="Run these arms alone.")
    parser.add_argument("--dry-run", action="store_true", help="Say what would be run.")
    parser.add_argument("--report-only", action="store_true", help="Make the report again.")
    parser.add_argument("--jobs", type=int, default=1, help="Cells at a time.")
    parser.add_argument("--launcher", type=Literal["local", "slurm"], default="local", help="Where the cells run.")
    parser.add_argument("--slurm", type=dict, default={}, help="Parameters of submitit.AutoExecutor: timeout_min, ...")
    parser.add_argument("--output", type=str | None, default=None, help="The folder. Default: runs/ablations/NAME")
    files = config_files(args)
    try:
        options = parser.parse_args(args)
        built = getattr(parser, "instantiate", parser.instantiate_classes)(options)  # newer and older name
        study = Study(**{each.name: built[each.name] for each in dataclasses.fields(Study)})
    except (argparse.ArgumentError, ValueError) as error:
        ours = type(error) is ValueError  # else it is jsonargparse's page, or a file that is no text
        text = first_error(str(error)) if ours else explain(str(error), parser, files)
        raise ValueError(text if any(file in text for file in files) else f"{', '.join(files)}: {text}") from error
    if options.config[-1] is None:
        raise ValueError("--config must be a file: its name is that of the study")
    file = Path(str(options.config[-1]))
    own = same_base(study, file)
    if not own:  # what the file says of its own base is not true of another one
        study = dataclasses.replace(study, differs=[], seconds=None, machine="")
    for arm in options.only or []:
        if arm not in study.arms:
            raise ValueError(f"--only: {unknown(arm, study.arms, 'arm')}")
    return options, study, file, own


def plan(study: Study, file: Path, elsewhere: bool = False) -> list[Cell]:
    """List the cells, and build each arm once, to see that it can be trained and inspected.

    Args:
        study: what is compared.
        file: that it was read from, for messages.
        elsewhere: whether other machines will run them, so that this one need not have their devices.

    Raises:
        ValueError: an arm cannot be built, or gives nothing that could be compared.
    """
    cells = []
    bases = [word for path in study.bases for word in ("--config", str(path))]
    for number, (arm, changes) in enumerate(study.arms.items(), 1):
        own = [key for key in NOT_OF_ARMS if key in (changes or {})]
        if own:
            raise ValueError(f"{file}: arms.{arm}.{own[0]}: each cell has its own ({', '.join(NOT_OF_ARMS)})")
        overrides = ["--config", json.dumps(changes)] if changes else []
        try:
            with _quiet(), Console(stderr=True).status(f"building arm {number} of {len(study.arms)}: {escape(arm)}"):
                cli = (CellElsewhereCLI if elsewhere else CellCLI)([*bases, *overrides, f"--name={arm}"])
            config, shape = cli.plain(), cli.model.image_shape
            check(study, arm, cli, shape)
        except Exception as error:
            raise ValueError(f"{file}: arms.{arm}: {error}") from error
        facts = {
            "parameters": parameters(cli.model),
            "multiply_adds": multiply_adds(cli.model, shape) if shape else None,
            "devices": cli.trainer.world_size,
            "gpu": cli.trainer.strategy.root_device.type == "cuda",
        }
        cells += [Cell(arm, seed, {**config, "seed_everything": seed}, facts) for seed in study.seeds]
    return cells


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Leave by an exception when the process is asked to end, so that the cells are ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says of a command line that comes from a program, and of the machine, for each arm."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            for text in ("LightningCLI's args parameter is intended to run from within", "The `srun` command is"):
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        logging.disable(logging.NOTSET)


def check(study: Study, arm: str, cli: CellCLI, shape: tuple[int, int, int] | None) -> None:
    """Check that an arm gives what the study compares; ``shape`` is that of an image, if it is known.

    Raises:
        ValueError: it does not.
    """
    data, model, asked = cli.datamodule, cli.model, study.inspect
    metrics = [*model.val_metrics, *(model.test_metrics if has_test_split(data) else ())]
    if study.metric not in metrics:
        raise ValueError(f"metric: {unknown(study.metric, metrics, 'metric')}")
    if cli.config.trainer.fast_dev_run:
        raise ValueError("trainer.fast_dev_run leaves nothing that could be compared")
    if asked is None or arm not in asked.arms:
        return
    if cli.config.trainer.enable_checkpointing is False or cli.config.best.monitor is None:
        raise ValueError("inspect needs the best checkpoint: trainer.enable_checkpointing and best.monitor are off")
    Inspection(model, asked.conditions, asked.draws)
    if shape is not None:
        check_resolutions(model, asked.conditions, shape)
    if asked.split == "test" and not has_test_split(data):
        raise ValueError(f"inspect.split: the data ({type(data).__name__}) have no test images, choose val")
    whole_batches(data, asked.split).check(asked.conditions, cli.trainer.world_size)


def listing(study: Study, pairs: Pairs, chosen: Sequence[str], jobs: int) -> str:
    """Say what would be run, and how long that takes."""
    width, left = max(len(cell.arm) for cell, _ in pairs), 0
    lines = [study.question, ""]
    for cell, folder in pairs:
        new = "goes on" if folder.begun else "new"
        state = "finished" if folder.finished else "left out" if cell.arm not in chosen else new
        left += state in ("new", "goes on")
        cost = cell.facts["multiply_adds"]
        size = f"{cell.facts['parameters'] / 1e6:9.3f} M parameters"
        size += "" if cost is None else f" {cost / 1e6:10.2f} M multiply-adds"
        lines.append(f"{cell.arm:{width}}  seed {cell.seed:<4} {state:9}{size}")
    known = seconds_a_cell([folder for _, folder in pairs])
    each, where = known or study.seconds, "" if known or not study.machine else f" on {study.machine}"
    estimate = (
        "nobody knows how long one takes" if each is None else f"about {duration(each * math.ceil(left / jobs))}{where}"
    )
    return "\n".join([*lines, "", f"{left} of {len(pairs)} cells to run, {estimate}"])


def same_base(study: Study, file: Path) -> bool:
    """Say whether the base is the one that the study's file names."""
    own = yaml.safe_load(file.read_text(encoding="utf8")).get("base")
    bases = [(file.parent / path).resolve() for path in (own if isinstance(own, list) else [own] if own else [])]
    return bases == [path.resolve() for path in study.bases]


def main(args: list[str] | None = None) -> None:
    """Run the study, and report it.

    Args:
        args: the command line, as a list; default is the program's own.
    """
    with readable_errors():
        options, study, file, own_base = parse(args)
        name = file.stem if own_base else f"{file.stem}-{study.bases[-1].stem}"
        folder = StudyFolder(Path(options.output or Path("runs", "ablations", name)), file.stem, study)
        folder.check()
        if options.report_only and not folder.note.is_file():
            raise ValueError(f"--report-only: there is no study in {folder.path}; --output says where it is")
        slurm = options.launcher == "slurm"
        cells = plan(study, file, elsewhere=slurm or options.report_only)
        launcher: Launcher | None = None
        if slurm and not options.report_only:
            launcher = Slurm(folder.path / "slurm", options.jobs, file.stem, options.slurm)
        elif not options.report_only:
            devices = max(cell.facts["devices"] for cell in cells)
            launcher = Local(options.jobs, devices, gpu=any(cell.facts["gpu"] for cell in cells))
    pairs = list(zip(cells, folder.cells(cells, study.evaluation), strict=True))
    chosen = options.only or list(study.arms)
    if options.dry_run:
        print(listing(study, pairs, chosen, options.jobs))
        return
    for name in (stale := folder.left_aside(cells)):
        print(f"left aside, of an earlier version of the study: {folder.path / 'cells' / name}")

    def report() -> None:
        write_report(folder.path, study, gather(study, pairs), stale)

    if launcher is None:
        report()
    else:
        todo = [(cell, each) for cell, each in pairs if cell.arm in chosen and not each.finished]
        known = seconds_a_cell([each for _, each in pairs]) or study.seconds
        with ExitStack() as stack:
            with readable_errors():
                stack.enter_context(folder.claimed(file))
            stack.enter_context(_ended_by_sigterm())
            print(f"study folder: {folder.path}; {len(pairs) - len(todo)} cells are finished, {len(todo)} are to run")
            try:
                run(todo, launcher, Display(todo, options.jobs, known), report)
            finally:
                report()
    print(f"report: {folder.path / 'index.html'}")
    left = [f"{cell.arm}, seed {cell.seed}" for cell, each in pairs if cell.arm in chosen and not each.finished]
    if left and not options.report_only:
        print(f"not finished: {'; '.join(left)} (see the report)", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
