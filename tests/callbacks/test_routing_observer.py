from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from dyn_lightning.callbacks import ExpertExamples, RoutingHistogram, RoutingProjector, RoutingReport, ScalarLayout
from dyn_lightning.callbacks.batches import class_names, normalization
from dyn_lightning.callbacks.routing_observer import RoutingObserver, Seen
from dyn_lightning.routing import named_routers
from tests.callbacks.boards import constant, pictures, scalars, train
from tests.callbacks.coded import Data, data, routed, softmax_rows
from tests.training import classifier, digits, warns_once


class Notes(RoutingObserver):
    """Notes what was seen in each evaluation."""

    def __init__(self, max_images: int = 1000, split: str = "val", **options: Any) -> None:
        super().__init__(max_images, split, None, **options)
        self.seen: list[Seen] = []

    def wanted(self, trainer: Trainer) -> bool:
        return True

    def finish(self, trainer: Trainer, pl_module: LightningModule, seen: Seen) -> None:
        self.seen.append(seen)


class Held(Callback):
    """Measures what an observer keeps after each batch."""

    def __init__(self, observer: RoutingObserver) -> None:
        self.observer, self.most = observer, 0

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        kept = [
            tensor
            for part in self.observer._kept
            for tensor in (*part.weights.values(), part.labels, part.images)
            if tensor is not None
        ]
        self.most = max(self.most, sum(tensor.untyped_storage().nbytes() for tensor in kept))


def observe(rows: Data, *kernels: int, folder: Path, **options: Any) -> Seen:
    notes = Notes(**options)
    train(routed(*kernels), rows, folder, notes)
    (seen,) = notes.seen
    return seen


class TestWhichImages:
    @pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 20])
    def test_all_where_they_are_few(self, batch_size: int, tmp_path: Path) -> None:
        weights = [softmax_rows(11, 3), softmax_rows(11, 2)]
        seen = observe(data(*weights, batch_size=batch_size), 3, 2, folder=tmp_path)
        assert list(seen.weights) == ["backbone.0", "backbone.1"]
        assert all(torch.equal(got, want) for got, want in zip(seen.weights.values(), weights, strict=True))
        assert seen.labels is not None
        assert seen.labels.tolist() == [n % 4 for n in range(11)]
        assert seen.images is None

    @pytest.mark.parametrize(
        ("most", "batch_size", "places"),
        [
            (11, 3, list(range(11))),
            (4, 3, [0, 3, 6, 9]),
            (3, 5, [0, 4, 8]),
            (2, 2, [0, 6]),
            (1, 4, [0]),
        ],
    )
    def test_some_at_equal_distances(self, most: int, batch_size: int, places: list[int], tmp_path: Path) -> None:
        weights = softmax_rows(11, 3)
        seen = observe(data(weights, batch_size=batch_size), 3, folder=tmp_path, max_images=most)
        assert torch.equal(seen.weights["backbone.0"], weights[torch.tensor(places)])
        assert seen.labels is not None
        assert seen.labels.tolist() == [place % 4 for place in places]

    def test_sorted_data_give_every_class(self, tmp_path: Path) -> None:
        rows = data(softmax_rows(60, 2), batch_size=7)
        rows.val_set.tensors = (rows.val_set.tensors[0], torch.arange(60) // 6)  # type: ignore[attr-defined]
        seen = observe(rows, 2, folder=tmp_path, max_images=20)
        assert seen.labels is not None
        assert seen.labels.unique().tolist() == list(range(10))

    def test_data_without_a_length_give_the_first(self, tmp_path: Path) -> None:
        weights = softmax_rows(11, 3)
        pairs = list(data(weights).val_set)  # type: ignore[call-overload]

        class Stream(IterableDataset):
            def __iter__(self) -> Any:
                return iter(pairs)

        rows = data(weights)
        rows.val_set = Stream()
        seen = observe(rows, 3, folder=tmp_path, max_images=5)
        assert torch.equal(seen.weights["backbone.0"], weights[:5])

    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_repeated_ones_are_left_out(self, rank: int, tmp_path: Path) -> None:
        """A sampler gives three ranks four images each of ten, and so two of them twice."""
        weights = softmax_rows(10, 3)
        rows = data(weights)
        sampler: DistributedSampler = DistributedSampler(rows.val_set, 3, rank, shuffle=False)
        assert len(sampler) == 4
        rows.val_dataloader = lambda: DataLoader(rows.val_set, 2, sampler=sampler)  # type: ignore[method-assign]
        seen = observe(rows, 3, folder=tmp_path)
        assert torch.equal(seen.weights["backbone.0"], weights[rank::3])

    def test_repeated_ones_of_a_batch_sampler_are_left_out(self, tmp_path: Path) -> None:
        weights = softmax_rows(10, 3)
        rows = data(weights)
        batches = BatchSampler(DistributedSampler(rows.val_set, 3, 2, shuffle=False), 2, drop_last=False)
        rows.val_dataloader = lambda: DataLoader(rows.val_set, batch_sampler=batches)  # type: ignore[method-assign]
        assert torch.equal(observe(rows, 3, folder=tmp_path).weights["backbone.0"], weights[2::3])

    def test_of_a_part_of_the_batches(self, tmp_path: Path) -> None:
        weights, notes = softmax_rows(11, 3), Notes()
        train(routed(3), data(weights), tmp_path, notes, limit_val_batches=2)
        assert torch.equal(notes.seen[0].weights["backbone.0"], weights[:6])

    def test_each_evaluation_begins_anew(self, tmp_path: Path) -> None:
        notes = Notes()
        train(routed(3), data(softmax_rows(11, 3)), tmp_path, notes, max_epochs=3, num_sanity_val_steps=2)
        assert [len(seen.weights["backbone.0"]) for seen in notes.seen] == [11, 11, 11]

    def test_of_the_split_that_is_wanted(self, tmp_path: Path) -> None:
        notes, rows = Notes(split="test"), data(softmax_rows(11, 3))
        trainer = train(routed(3), rows, tmp_path, notes)
        assert notes.seen == []
        trainer.test(trainer.model, rows, verbose=False)
        trainer.validate(trainer.model, rows, verbose=False)
        assert [len(seen.weights["backbone.0"]) for seen in notes.seen] == [11]


class TestLayers:
    def test_chosen_by_globs(self, tmp_path: Path) -> None:
        rows = data(*[softmax_rows(5, kernels) for kernels in (3, 2, 4)])
        seen = observe(rows, 3, 2, 4, folder=tmp_path, layers=["*.0", "backbone.2"])
        assert list(seen.weights) == ["backbone.0", "backbone.2"]

    def test_a_glob_that_matches_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"layers='layer4' matches no routed layer; there are backbone.0, back"):
            observe(data(softmax_rows(5, 3), softmax_rows(5, 3)), 3, 3, folder=tmp_path, layers=["*.0", "layer4"])


class TestThumbnails:
    def test_of_the_images_that_are_kept(self, tmp_path: Path) -> None:
        rows = data(softmax_rows(11, 8))
        seen = observe(rows, 8, folder=tmp_path, max_images=4, side=8)
        assert seen.images is not None
        assert seen.images.shape == (4, 3, 8, 8)
        pictures = torch.stack([rows.val_set[place][0] for place in (0, 3, 6, 9)])
        stretched = pictures / pictures.amax((1, 2, 3), keepdim=True)  # the least is 0
        assert torch.equal(seen.images[:, :1], (stretched * 255).round().to(torch.uint8))

    def test_of_images_of_different_shapes(self, tmp_path: Path) -> None:
        """One a batch, as evaluation without cropping has."""
        rows = data(softmax_rows(2, 3))
        wide, high = torch.rand(1, 8, 20), torch.rand(1, 16, 8)
        pairs: Any = [(wide, torch.tensor(0)), (high, torch.tensor(1))]
        rows.val_set, rows.batch_size = pairs, 1
        seen = observe(rows, 3, folder=tmp_path, side=10)
        assert seen.images is not None
        assert seen.images.shape == (2, 3, 10, 10)
        assert (seen.images[0, :, 4:] == 255).all()
        assert (seen.images[1, :, :, 5:] == 255).all()

    def test_bytes_are_shown_as_they_are(self, tmp_path: Path) -> None:
        rows = data(softmax_rows(2, 3))
        pixels = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
        rows.val_set.tensors = (pixels, torch.arange(2))  # type: ignore[attr-defined]
        model, notes = routed(3), Notes(side=8)
        step = model.validation_step
        model.validation_step = lambda batch, batch_idx: step((batch[0] / 255, batch[1]), batch_idx)  # type: ignore
        train(model, rows, tmp_path, notes)
        assert notes.seen[0].images is not None
        assert torch.equal(notes.seen[0].images[:, 1:2], pixels)

    @pytest.mark.parametrize(("mean", "std"), [((0.5, 0.4), (1.0, 1.0)), ("half", 1.0), (0.5, None)])
    def test_a_normalisation_of_another_form_is_not_taken(self, mean: Any, std: Any, tmp_path: Path) -> None:
        rows: Any = data(softmax_rows(2, 3))
        rows.mean, rows.std = mean, std
        seen = observe(rows, 3, folder=tmp_path, side=8)
        assert seen.images is not None
        assert seen.images.amax() == 255

    def test_as_before_the_normalisation(self, tmp_path: Path) -> None:
        notes, rows = Notes(side=8), digits()
        train(classifier(), rows, tmp_path, notes, constant(), limit_val_batches=1)
        seen = notes.seen[0].images
        batch, _ = next(iter(rows.val_dataloader()))
        pixels = (batch * 0.3760 + 0.3053).expand(-1, 3, -1, -1)  # of Digits
        assert seen is not None
        assert (seen.float() / 255 - pixels).abs().max() <= 0.5 / 255 + 1e-6


class TestMemory:
    """max_images (4 sum of K + 8) bytes, and 3 max_images side ** 2 for thumbnails, as the docstring says."""

    @pytest.mark.parametrize("count", [40, 400])
    def test_is_bounded(self, count: int, tmp_path: Path) -> None:
        rows = data(softmax_rows(count, 3), softmax_rows(count, 5), batch_size=7)
        notes = Notes(max_images=20, side=4)
        held = Held(notes)
        train(routed(3, 5), rows, tmp_path, notes, held)
        assert 0 < held.most <= 4 * 20 * (3 + 5) + 8 * 20 + 3 * 20 * 4**2

    def test_so_is_the_number_of_tensors(self, tmp_path: Path) -> None:
        """One image a batch: each tensor takes hundreds of bytes, whatever is in it."""
        weights = softmax_rows(300, 3)
        notes, most = Notes(), 0

        class Count(Callback):
            def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
                nonlocal most
                most = max(most, len(notes._kept))

        train(routed(3), data(weights, batch_size=1), tmp_path, notes, Count())
        assert 0 < most <= 64
        assert torch.equal(notes.seen[0].weights["backbone.0"], weights)
        assert notes.seen[0].labels is not None
        assert notes.seen[0].labels.tolist() == [n % 4 for n in range(300)]

    def test_batches_without_a_chosen_image_keep_nothing(self, tmp_path: Path) -> None:
        notes, counts = Notes(max_images=2), []

        class Count(Callback):
            def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
                counts.append(len(notes._kept))

        train(routed(3), data(softmax_rows(6, 3), batch_size=1), tmp_path, notes, Count())
        assert counts == [1, 1, 1, 2, 2, 2]


class TestHooks:
    def hooks(self, model: nn.Module) -> int:
        return sum(len(router._forward_hooks) for router in named_routers(model).values())

    def test_are_gone_after_each_evaluation(self, tmp_path: Path) -> None:
        counts, model = [], routed(3)

        class Count(Callback):
            def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
                counts.append(TestHooks().hooks(model))

            on_validation_end = on_train_batch_start = on_validation_batch_end

        train(model, data(softmax_rows(5, 3)), tmp_path, Notes(), Count(), max_epochs=2, limit_train_batches=2)
        assert counts == [0, 0, 1, 1, 0] * 2

    def test_are_gone_after_an_exception(self, tmp_path: Path) -> None:
        model = routed(3)
        step = model.validation_step

        def fails(batch: Any, batch_idx: int) -> None:
            step(batch, batch_idx)
            assert self.hooks(model) == 1
            raise RuntimeError("on purpose")

        model.validation_step = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="on purpose"):
            train(model, data(softmax_rows(5, 3)), tmp_path, Notes())
        assert self.hooks(model) == 0

    def test_a_compiled_model_is_compiled_again_after_several_observers(self, tmp_path: Path) -> None:
        """They leave in the order in which they came."""
        torch.compiler.reset()
        compiled: list[bool] = []

        def backend(graph: Any, inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                compiled.append(True)
                return graph(*args)

            return run

        model = classifier()
        model.backbone = torch.compile(model.backbone, backend=backend)
        images = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            model.eval()(images)
        assert compiled
        model.train()
        train(model, digits(), tmp_path, constant(), Notes(), Notes(), Notes(), limit_val_batches=2)
        compiled.clear()
        with torch.no_grad():
            model.eval()(images)
        assert compiled


class Form:
    """The same images and labels, in batches of another form."""

    def __init__(self, form: Callable[[int, Tensor, Tensor], Any], back: Callable[[Any], Any]) -> None:
        self.form, self.back = form, back

    def observed(self, weights: Tensor, folder: Path) -> Seen:
        rows, model, notes = data(weights), routed(weights.shape[1]), Notes(side=8)
        images: Any = rows.val_set
        batches = [self.form(first, *images[first : first + 3]) for first in range(0, len(weights), 3)]
        step = model.validation_step
        model.validation_step = lambda batch, batch_idx: step(self.back(batch), batch_idx)  # type: ignore[method-assign]
        rows.val_dataloader = lambda: DataLoader(batches, batch_size=None)  # type: ignore[arg-type,method-assign]
        train(model, rows, folder, notes)
        return notes.seen[0]


@pytest.mark.parametrize(
    "form",
    [
        Form(lambda first, x, y: (first + torch.arange(len(x)), x, y), lambda batch: batch[1:]),
        Form(
            lambda _, x, y: {"weights": torch.ones(10), "image": x, "y": y}, lambda batch: (batch["image"], batch["y"])
        ),
        Form(lambda _, x, y: (list(x), y), lambda batch: (torch.stack(batch[0]), batch[1])),
    ],
    ids=["numbers first", "weights of the classes first", "a list of images"],
)
def test_labels_and_sizes_are_found(form: Form, tmp_path: Path) -> None:
    weights = softmax_rows(7, 3)
    seen = form.observed(weights, tmp_path)
    assert torch.equal(seen.weights["backbone.0"], weights)
    assert seen.labels is not None
    assert seen.labels.tolist() == [n % 4 for n in range(7)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (np.array(["cat", "dog"]), ("cat", "dog")),
        ({0: "cat", 2: "dog"}, ("cat", "1", "dog")),
        (iter(["cat", "dog"]), ()),  # could be read once
        (np.array("cat"), ()),
        ((), ()),
        (None, ()),
        (lambda: ["cat"], ()),
        ("cats", ()),
        ({"cat": 0}, ()),
        (7, ()),
    ],
    ids=repr,
)
def test_names_of_classes(names: Any, expected: tuple[str, ...]) -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(class_names=names))
    assert class_names(trainer) == expected


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        (0.5, 2, ([0.5], [2.0])),
        (torch.tensor(0.5), np.float32(2), ([0.5], [2.0])),
        (np.array([0.5, 0.25, 0]), (1, 2, 3), ([0.5, 0.25, 0], [1, 2, 3])),
        (torch.zeros(3, 1, 1), [torch.tensor(2.0)], ([0, 0, 0], [2])),
        (0.5, None, (None, None)),
        ("half", 1, (None, None)),
        ([0.5, 0.5], 1, (None, None)),
        (float("nan"), 1, (None, None)),
        (lambda: 0.5, 1, (None, None)),
        (torch.ones(1, requires_grad=True), 1, (None, None)),
    ],
    ids=repr,
)
def test_normalization(mean: Any, std: Any, expected: tuple[Any, Any]) -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(mean=mean, std=std))
    assert normalization(trainer, channels=3) == expected


class TestNotices:
    def test_validate_alone_without_a_logger(self) -> None:
        rows = data(softmax_rows(4, 3))
        trainer = Trainer(accelerator="cpu", callbacks=[RoutingReport()], logger=False, enable_progress_bar=False)
        with warns_once("no pictures are drawn, since no logger takes them (there is no logger)"):
            trainer.validate(routed(3), rows, verbose=False)

    def test_without_validation(self, tmp_path: Path) -> None:
        observers = RoutingReport(), ExpertExamples(), RoutingProjector()
        with warns_once("nothing is shown of the routing after epochs, since the training has no validation"):
            train(routed(3), data(softmax_rows(4, 3)), tmp_path, *observers, limit_val_batches=0)

    @pytest.mark.parametrize("callback", [RoutingHistogram, RoutingProjector, ScalarLayout])
    def test_pictures_without_tensorboard(self, callback: type[Callback], tmp_path: Path) -> None:
        class Takes(CSVLogger):
            def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
                """As other loggers have it."""

        with warns_once("histograms, the projector and the layout of the scalars need a TensorBoardLogger"):
            train(routed(3), data(softmax_rows(4, 3)), tmp_path, callback(), logger=Takes(tmp_path))


def test_the_validation_and_the_test_have_tags_of_their_own(tmp_path: Path) -> None:
    """Both are watched in one training, and tested at its last step."""
    rows = data(softmax_rows(5, 3), softmax_rows(5, 2))
    kinds = RoutingReport, ExpertExamples
    observers = [kind(split=split) for kind in kinds for split in ("val", "test")]  # type: ignore[operator]
    trainer = train(routed(3, 2), rows, tmp_path, *observers, RoutingProjector(split="test"))
    trainer.test(trainer.model, rows, verbose=False)
    found, drawn = scalars(trainer), pictures(trainer)
    for prefix in ("", "test_"):
        assert len(found[f"{prefix}routing_images"]) == len(found[f"{prefix}routing_entropy/backbone.1"]) == 1
        for tag in ("routing_report/depth", "routing_report/classes", "expert_examples/backbone.0"):
            assert len(drawn[f"{prefix}{tag}"]) == 1
    assert len([*tmp_path.rglob("*/test_routing/metadata.tsv")]) == 1


def test_batches_of_another_form(tmp_path: Path) -> None:
    """Images and labels are found in a dictionary, whatever stands before them."""
    weights, notes = softmax_rows(7, 3), Notes(side=8)
    rows: Any = data(weights)

    class Named(Dataset):
        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> dict[str, Any]:
            image, label = rows.val_set[index]
            return {
                "id": 7_000_000_000 + index,
                "weight": 0.5,
                "name": f"{index}",
                "image": image,
                "meta": {"label": label},
            }

    model = routed(3)
    step = model.validation_step
    model.validation_step = lambda batch, batch_idx: step((batch["image"], batch["meta"]["label"]), batch_idx)  # type: ignore
    rows.val_dataloader = lambda: DataLoader(Named(), 3)
    train(model, rows, tmp_path, notes)
    assert torch.equal(notes.seen[0].weights["backbone.0"], weights)
    assert notes.seen[0].labels is not None
    assert notes.seen[0].labels.tolist() == [n % 4 for n in range(7)]
    assert notes.seen[0].images is not None


@pytest.mark.parametrize("kind", ["numbers of images", "masks"])
def test_what_is_no_class(kind: str, tmp_path: Path) -> None:
    rows, model, notes = data(softmax_rows(4, 3)), routed(3), Notes()
    images, labels = rows.val_set.tensors  # type: ignore[attr-defined]
    other = 10**12 + torch.arange(4) if kind == "numbers of images" else labels > 1
    rows.val_set.tensors = (images, other)  # type: ignore[attr-defined]
    step = model.validation_step
    model.validation_step = lambda batch, batch_idx: step((batch[0], batch[1].long() % 2), batch_idx)  # type: ignore
    train(model, rows, tmp_path, notes)
    assert notes.seen[0].labels is None
