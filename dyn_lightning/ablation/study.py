"""What a study compares, as its YAML file says it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import Path_fr

from dyn_lightning.ablation.inspection import ALL_MODES, Condition
from dyn_lightning.checks import check_count, unknown

READ = ("read", "second-hand")  # how sure published numbers are; what is from memory has no place in a table


@dataclass
class Inspect:
    """What trained networks are tested under.

    Args:
        arms: whose networks.
        conditions: what their routing weights become; by default each mode in all layers.
        draws: of each condition that shuffles.
        split: whose images: ``"test"`` or ``"val"``.

    Raises:
        ValueError: a number of draws below 1, or another split.
    """

    arms: list[str]
    conditions: list[Condition] = field(default_factory=lambda: list(ALL_MODES))
    draws: int = 5
    split: str = "test"

    def __post_init__(self) -> None:
        check_count("inspect.draws", self.draws)
        if self.split not in ("val", "test"):
            raise ValueError(f"inspect.split={self.split!r} must be val or test")


@dataclass
class Published:
    """The numbers of a paper.

    Args:
        source: which table of which paper.
        tag: ``"read"`` in the source, or ``"second-hand"``, in a text that quotes it.
        values: per cent, by the name of an arm or of a condition.
        setup: the network and the data that they are of.

    Raises:
        ValueError: another tag.
    """

    source: str
    tag: str
    values: dict[str, float]
    setup: str = ""

    def __post_init__(self) -> None:
        self.values = {str(name): value for name, value in self.values.items()}
        if self.tag not in READ:
            raise ValueError(f"published.tag={self.tag!r} must be one of {list(READ)}: no other number is printed")


@dataclass
class Study:
    """A comparison of networks that are trained alike but for what it asks about.

    Args:
        question: that it answers.
        base: the configuration of ``fit`` that all arms start from; of several the later ones win.
        arms: what each changes in it, by name: nested keys of ``fit``'s configuration.
        baseline: the arm that the others are compared with, seed by seed.
        seeds: each arm is trained once with each.
        metric: the number that is compared, as ``fit`` records it.
        inspect: what trained networks are tested under, without training.
        show: globs over the numbers that ``fit`` records (``test/loss``, ``groups/*``), for a table of their own.
        published: the numbers of the paper.
        differs: what is not as in the paper.
        seconds: that one network takes, trained and inspected, on the machine that ``machine`` says.
        machine: see ``seconds``.

    Raises:
        ValueError: no arms or seeds, a seed twice, or a name that does not exist.
    """

    question: str
    base: Path_fr | list[Path_fr]
    arms: dict  # with types inside, jsonargparse would build the classes that it names
    baseline: str | None = None
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    metric: str = "test/top1"
    inspect: Inspect | None = None
    show: list[str] = field(default_factory=list)
    published: Published | None = None
    differs: list[str] = field(default_factory=list)
    seconds: float | None = None
    machine: str = ""

    def __post_init__(self) -> None:
        self.arms = {str(name): changes for name, changes in self.arms.items()}  # YAML reads a name like 4 as a number
        if not self.arms:
            raise ValueError("arms is empty: a study needs at least one, `NAME: {}` is the base as it is")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be different numbers, at least one")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds} must be from 0 to 4294967295")
        wanted = {"baseline": [self.baseline] if self.baseline is not None else []}
        wanted["inspect.arms"] = self.inspect.arms if self.inspect else []
        for key, names in wanted.items():
            for name in names:
                if name not in self.arms:
                    raise ValueError(f"{key}: {unknown(name, self.arms, 'arm')}")
        rows = [*self.arms, *(condition.name for condition in (self.inspect.conditions if self.inspect else []))]
        for name in self.published.values if self.published else []:
            if name not in rows:
                raise ValueError(f"published.values: {unknown(name, rows, 'arm or condition')}")

    def evaluation(self, arm: str) -> dict[str, str]:
        """Give the arguments of ``evaluate`` for the networks of an arm; none if they are not inspected."""
        if self.inspect is None or arm not in self.inspect.arms:
            return {}
        conditions = json.dumps([asdict(condition) for condition in self.inspect.conditions])
        return {"split": self.inspect.split, "draws": str(self.inspect.draws), "conditions": conditions}

    @property
    def bases(self) -> list[Path]:
        """The files of the base."""
        return [Path(str(path.absolute)) for path in (self.base if isinstance(self.base, list) else [self.base])]


@dataclass(frozen=True)
class Cell:
    """One network to train: an arm with a seed.

    Its folder's name holds the digest of all that decides its result, so that a changed study has other folders.

    Args:
        arm: its name.
        seed: of the training.
        config: the resolved configuration of ``fit``, as plain values.
        facts: what is known before it is trained: parameters, multiply-adds.
    """

    arm: str
    seed: int
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', self.arm)}-seed{self.seed}-{digest(self.config)}"


def digest(value: Any) -> str:
    """Give eight letters that change with a value of plain types.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
