"""The order, the augmentation and the resumption of training, and evaluation that sees every image once."""

from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dyn_lightning.data import Digits, ImageDataModule
from dyn_lightning.data.module import derive_seed
from tests.training import Batches, classifier, fit, static


class Numbered(Dataset):
    """Image ``i`` is the number ``i`` and a random number, as an augmentation would draw."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(index), torch.rand(())


def make(length: int, batch_size: int, ranks: int = 1, rank: int = 0, num_workers: int = 0) -> ImageDataModule:
    data = ImageDataModule(10, 1, 1, batch_size, num_workers)
    data.train_set = data.val_set = data.test_set = Numbered(length)
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
    return data


def load(data: ImageDataModule, epoch: int = 0, first: int | None = None) -> list[dict[int, float]]:
    """Give the batches of an epoch, or the first few: random number by image."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # as Lightning does before each epoch
    return [dict(zip(index.tolist(), drawn.tolist(), strict=True)) for index, drawn in islice(loader, first)]


def seen(batches: list[dict[int, float]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


class TestOrder:
    def test_an_epoch_sees_each_image_at_most_once(self) -> None:
        batches = load(make(23, 4))
        assert [len(batch) for batch in batches] == [4] * 5
        assert len(set(seen(batches))) == 20

    def test_a_single_batch_may_be_incomplete(self) -> None:
        assert sorted(seen(load(make(5, 8)))) == list(range(5))

    def test_is_shuffled_anew_in_each_epoch(self) -> None:
        orders = [tuple(seen(load(make(24, 4), epoch))) for epoch in range(3)]
        assert len({tuple(range(24)), *orders}) == 4

    def test_is_a_function_of_seed_and_epoch(self) -> None:
        first = load(make(24, 4), 2)
        torch.manual_seed(1)
        data = make(24, 4)
        load(data, 1)
        assert load(data, 2) == first

    def test_differs_between_seeds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = [seen(load(make(24, 4), epoch)) for epoch in (0, 1)]
        monkeypatch.setenv("PL_GLOBAL_SEED", "4")
        second = [seen(load(make(24, 4), epoch)) for epoch in (0, 1)]
        assert first[0] != second[0]
        assert first[1] != second[0], "the second epoch of a seed is the first epoch of the next seed"

    def test_without_a_seed_it_is_that_of_seed_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PL_GLOBAL_SEED")
        unseeded = load(make(24, 4))
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")
        assert load(make(24, 4)) == unseeded

    @pytest.mark.parametrize("epoch", [0, 1])
    @pytest.mark.parametrize("length", [24, 25, 26, 30, 31])
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_ranks_see_together_what_one_sees_alone(self, ranks: int, length: int, epoch: int) -> None:
        alone = load(make(length, 8), epoch)
        shares = [load(make(length, 8 // ranks, ranks, rank), epoch) for rank in range(ranks)]
        together = [
            {index: drawn for share in batch for index, drawn in share.items()} for batch in zip(*shares, strict=True)
        ]
        assert together == alone


class TestAugmentation:
    def test_is_a_function_of_seed_epoch_and_index(self) -> None:
        first = {index: drawn for batch in load(make(12, 4), 5) for index, drawn in batch.items()}
        torch.manual_seed(1)
        other = make(12, 3, ranks=2, rank=1)
        load(other, 4)
        assert {index: drawn for batch in load(other, 5) for index, drawn in batch.items()}.items() < first.items()

    def test_differs_between_images_and_epochs(self) -> None:
        data = make(12, 4)
        drawn = [value for epoch in range(3) for batch in load(data, epoch) for value in batch.values()]
        assert len(set(drawn)) == 36

    def test_does_not_depend_on_the_workers(self) -> None:
        assert load(make(12, 4, num_workers=2), 1) == load(make(12, 4), 1)

    def test_leaves_the_random_numbers_of_the_training_alone(self) -> None:
        loader = iter(make(12, 4).train_dataloader())
        next(loader)
        torch.manual_seed(0)
        next(loader)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))


class TestEvaluation:
    @pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader"])
    @pytest.mark.parametrize("length", [16, 17, 23])
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_sees_every_image_once(self, ranks: int, length: int, loader: str) -> None:
        shares = [
            [index for batch, _ in getattr(make(length, 4, ranks, rank), loader)() for index in batch.tolist()]
            for rank in range(ranks)
        ]
        assert sorted(chain(*shares)) == list(range(length))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_one_rank_goes_through_in_order(self) -> None:
        assert torch.cat([batch for batch, _ in make(9, 4).val_dataloader()]).tolist() == list(range(9))


class TestResume:
    """Lightning restores the data module's state before or after it asks for the loader; both go on the same way."""

    def interrupted(self, batches: int, epoch: int = 2, **options: int) -> dict[str, int]:
        data = make(23, 4, **options)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        iterator = iter(loader)
        for _ in range(batches):
            next(iterator)
        return data.state_dict()

    @pytest.mark.parametrize("loader_first", [True, False])
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("batches", [1, 3])
    def test_goes_on_with_what_was_not_seen(self, batches: int, num_workers: int, loader_first: bool) -> None:
        state = self.interrupted(batches, num_workers=num_workers)
        data = make(23, 4)
        if loader_first:
            loader = data.train_dataloader()
            data.load_state_dict(state)
        else:
            data.load_state_dict(state)
            loader = data.train_dataloader()
        loader.sampler.set_epoch(2)
        rest = [dict(zip(index.tolist(), drawn.tolist(), strict=True)) for index, drawn in loader]
        assert rest == load(make(23, 4), 2)[batches:]
        loader.sampler.set_epoch(3)
        assert [index.tolist() for index, _ in loader] == [[*batch] for batch in load(make(23, 4), 3)]

    def test_each_rank_goes_on(self) -> None:
        state = self.interrupted(2, ranks=2)
        for rank in range(2):
            data = make(23, 4, 2, rank)
            data.load_state_dict(dict(state))
            assert load(data, 2) == load(make(23, 4, 2, rank), 2)[2:]

    def test_can_be_interrupted_again(self) -> None:
        data = make(23, 4)
        data.load_state_dict(self.interrupted(1))
        load(data, 2, first=2)
        other = make(23, 4)
        other.load_state_dict(data.state_dict())
        assert load(other, 2) == load(make(23, 4), 2)[3:]

    def test_between_epochs_nothing_is_skipped(self) -> None:
        data = make(23, 4)
        data.load_state_dict(self.interrupted(5))
        assert load(data, 3) == load(make(23, 4), 3)

    def test_after_the_epoch_it_is_forgotten(self) -> None:
        data = make(23, 4)
        data.load_state_dict(self.interrupted(3))
        load(data, 2)
        assert load(data, 2) == load(make(23, 4), 2)

    def test_leaves_the_saved_state_alone(self) -> None:
        state = self.interrupted(3)
        before = dict(state)
        data = make(23, 4)
        data.load_state_dict(state)
        load(data, 2)
        assert state == before

    def test_a_state_that_never_loaded_is_empty(self) -> None:
        assert make(23, 4).state_dict() == {}


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfit_batches_repeats_the_first_images() -> None:
    """Lightning replaces the sampler by one of its own."""
    data, batches = Digits(8, 16), Batches()
    fit(classifier(static()), data, batches, max_epochs=2, limit_train_batches=1.0, overfit_batches=2)
    expected = torch.stack([data.train_set[index][0] for index in range(32)])
    assert torch.equal(torch.cat([images for images, _ in batches.seen]), expected.repeat(2, 1, 1, 1))


def test_derive_seed_gives_what_torch_takes() -> None:
    seed = derive_seed(2**32 - 1, 10**6, 10**7, 63)
    assert seed == derive_seed(2**32 - 1, 10**6, 10**7, 63)
    assert 0 <= seed < 2**63
    torch.manual_seed(seed)


@pytest.mark.parametrize("other", [(2, 1), (1, 3), (1,), (1, 2, 0), (0, 1, 2)])
def test_derive_seed_differs_from_that_of(other: tuple[int, ...]) -> None:
    """With a zero at the end it is the seed of rank 0's step, which must not be that of an image's augmentation."""
    assert derive_seed(1, 2) != derive_seed(*other)


def test_derive_seed_rarely_collides() -> None:
    seeds = {derive_seed(seed, epoch, index) for seed in range(5) for epoch in range(10) for index in range(20)}
    assert len(seeds) == 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": -4}, "batch_size=-4 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be 0 or more"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
    ],
    ids=str,
)
def test_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**wrong)
