import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dyn_lightning.callbacks import ExpertExamples
from dyn_lightning.callbacks.expert_examples import largest_shares
from tests.callbacks.boards import drawn, pictures, texts, train
from tests.callbacks.coded import data, routed, softmax_rows
from tests.training import warns_once

__all__ = ["drawn"]  # a fixture


class TestLargestShares:
    def test_against_sorting(self) -> None:
        weights = softmax_rows(20, 3)
        best, rows = largest_shares(weights, 4)
        for kernel in range(3):
            order = sorted(range(20), key=lambda row: -weights[row, kernel].item())
            assert rows[kernel].tolist() == order[:4]
            assert best[kernel].tolist() == pytest.approx([weights[row, kernel].item() for row in order[:4]])

    def test_shares_not_weights(self) -> None:
        """A sigmoid gives the first image more, but it gives the other kernel as much."""
        _, rows = largest_shares(torch.tensor([[0.9, 0.9], [0.5, 0.1]]), 2)
        assert rows.tolist() == [[1, 0], [0, 1]]

    def test_what_is_not_finite_comes_last(self) -> None:
        best, rows = largest_shares(torch.tensor([[math.nan, 0.5], [0.25, 0.75], [0.5, 0.5]]), 9)
        assert rows[:, :2].tolist() == [[2, 1], [1, 2]]
        assert best[:, :2].tolist() == [[0.5, 0.25], [0.75, 0.5]]
        assert best[:, 2].isnan().all()


class TestFigure:
    def test_shows_the_images_in_their_order(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        weights, names = softmax_rows(9, 3), ("ant", "bee", "cow", "doe")
        rows = data(weights, class_names=names)
        train(routed(3), rows, tmp_path, ExpertExamples(images_per_expert=2, side=8))
        figure = drawn["expert_examples/backbone.0"]
        canvas = figure.axes[0].images[0].get_array()
        best, found = largest_shares(weights, 2)
        for kernel in range(3):
            for place in range(2):
                image = rows.val_set[int(found[kernel, place])][0][0].numpy()
                tile = canvas[kernel * 12 :, place * (8 + 2) :][:8, :8, 0]
                np.testing.assert_allclose(tile / 255, image / image.max(), atol=0.51 / 255)
                assert f"{names[int(found[kernel, place]) % 4]}\n{best[kernel, place]:.2f}" in texts(figure)

    @pytest.mark.parametrize(
        ("layers", "shown"), [(None, [0, 4]), (["*.1"], [1]), (["*.1", "*.[34]"], [1, 3, 4])], ids=str
    )
    def test_of_some_layers(self, layers: list[str] | None, shown: list[int], tmp_path: Path) -> None:
        rows = data(*[softmax_rows(5, 2) for _ in range(5)])
        trainer = train(routed(2, 2, 2, 2, 2), rows, tmp_path, ExpertExamples(layers))
        assert pictures(trainer) == {f"expert_examples/backbone.{layer}": [3] for layer in shown}

    def test_batches_without_images(self, tmp_path: Path) -> None:
        """Such as recordings (B, C, T), which the model makes images of."""
        rows, model = data(softmax_rows(5, 2)), routed(2)
        images, labels = rows.val_set.tensors  # type: ignore[attr-defined]
        rows.val_set.tensors = (images[:, 0], labels)  # type: ignore[attr-defined]
        step = model.validation_step
        model.validation_step = lambda batch, batch_idx: step((batch[0][:, None], batch[1]), batch_idx)  # type: ignore
        with warns_once("ExpertExamples draws nothing: the batches have no images (B, C, H, W)"):
            trainer = train(model, rows, tmp_path, ExpertExamples(), max_epochs=1)
        assert pictures(trainer) == {}


def test_refuses_rows_that_nobody_can_read() -> None:
    with pytest.raises(ValueError, match="images_per_expert=25 must be at most 24"):
        ExpertExamples(images_per_expert=25)


@pytest.mark.parametrize("wrong", [{"images_per_expert": 0}, {"side": 0}, {"max_images": 0}], ids=str)
def test_refuses(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        ExpertExamples(**wrong)
