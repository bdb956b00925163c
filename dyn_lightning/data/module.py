"""What data modules share: loaders whose order and augmentation do not depend on where a run stopped."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dyn_lightning.checks import check_count


class ImageDataModule(LightningDataModule):
    """Loaders over the data sets that a subclass sets in its constructor: ``train_set``, ``val_set``, ``test_set``.

    The order of an epoch and the augmentation of an image are functions of the seed and the epoch alone: two ranks with
    half the batch each see what one rank sees, and a run that is resumed in the middle of an epoch goes on with the
    images that it had not seen. Evaluation sees every image once, on any number of ranks.

    Args:
        num_classes: classes.
        channels: of an image.
        image_size: rows and columns of an image.
        batch_size: images a step and rank.
        num_workers: processes that load images; 0 loads in the main process.

    Attributes:
        class_names: names of the classes, or empty.
        mean: what was subtracted from pixels in [0, 1], a number or one a channel, or None where nobody knows.
        std: what they were divided by.

    Raises:
        ValueError: a batch size below 1 or a negative number of workers.
    """

    train_set: Dataset
    val_set: Dataset
    test_set: Dataset | None = None
    class_names: tuple[str, ...] = ()
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None

    def __init__(self, num_classes: int, channels: int, image_size: int, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_count("image_size", image_size)
        check_count("batch_size", batch_size)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 or more")
        self.num_classes = num_classes
        self.channels = channels
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._train_loader: TrainLoader | None = None
        self._resume: dict[str, int] = {}

    def train_dataloader(self) -> "TrainLoader":
        """Load the training images, shuffled, without a last incomplete batch (unless it is the only one)."""
        world_size, rank = self._place()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        # drop_last: ranks that fill up with images of the others could have a batch more than one rank has alone.
        drop_last = len(self.train_set) >= world_size  # type: ignore[arg-type]
        order = _ResumableOrder(self.train_set, world_size, rank, seed=derive_seed(seed), drop_last=drop_last)
        self._train_loader = TrainLoader(self.train_set, order, self.batch_size, self.num_workers)
        self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    def val_dataloader(self) -> DataLoader:
        """Load the validation images."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Load the test images."""
        assert self.test_set is not None
        return self._eval_loader(self.test_set)

    # Lightning would save and load the loader's state by itself, but does not load it when the loader was built before
    # the checkpoint is read, as happens where the schedule asks for the number of steps.
    def state_dict(self) -> dict[str, int]:
        """Say how far into which epoch the training is."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where the saved run stopped."""
        self._resume = dict(state_dict)  # it is cleared after use
        if self._train_loader is not None:
            self._train_loader.load_state_dict(self._resume)

    def _eval_loader(self, dataset: Dataset) -> DataLoader:
        world_size, rank = self._place()
        # Lightning's own would pad every rank to the same length and count the padding twice.
        sampler = UnrepeatedDistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        return DataLoader(dataset, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


class _ResumableOrder(DistributedSampler):
    """Gives (index, seed of the image's augmentation), from where the epoch was left."""

    resume: dict[str, int] | None = None

    @property
    def seen(self) -> int:
        return self.resume["seen"] // self.num_replicas if self.resume and self.resume["epoch"] == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        for index in itertools.islice(super().__iter__(), self.seen, None):
            yield index, derive_seed(self.seed, self.epoch, index)


class TrainLoader(DataLoader):
    """A loader that can be resumed in the middle of an epoch; Lightning saves and loads its state.

    Args:
        dataset: the training images.
        order: of this rank, from its ``epoch``, which Lightning sets.
        batch_size: images a batch.
        num_workers: processes that load.
        options: of the DataLoader; Lightning builds the loader anew with a sampler of its own to overfit batches.
    """

    def __init__(self, dataset: Any, order: _ResumableOrder, batch_size: int, num_workers: int, **options: Any) -> None:
        self.order = order
        self.seen = 0
        options = {"sampler": order, "drop_last": len(order) >= batch_size, **options}
        super().__init__(_Seeded(dataset), batch_size, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Load what is left of the epoch."""
        # A generator: nothing runs, and no worker starts, before the first batch is asked for, when the epoch is known.
        self.seen = self.order.seen
        for batch in super().__iter__():
            self.seen += self.batch_size or 1
            yield batch
        if self.order.resume is not None:
            self.order.resume.clear()  # another training with the same data starts from the beginning

    def state_dict(self) -> dict[str, int]:
        """Say which epoch this is, and how many of its images all ranks have seen."""
        return {"epoch": self.order.epoch, "seen": self.seen * self.order.num_replicas}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the saved loader stopped."""
        self.order.resume = state


class _Seeded(Dataset):
    """Draws each image's augmentation from the seed that comes with its index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):  # a sampler of Lightning's own, as with overfit_batches
            return self.dataset[key]
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return self.dataset[index]


def derive_seed(*key: int) -> int:
    """Mix whole numbers (seed, epoch, index, ...) to one seed.

    Example:
        >>> derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(2, 1)
        True
    """
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1)
