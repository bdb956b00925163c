import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from dyn_lightning.callbacks import GroupTracker
from dyn_lightning.layers import DGConv2d
from tests.callbacks.boards import drawn, pictures, scalars, texts, train
from tests.training import classifier, digits, fit, head, static, warns_once

__all__ = ["drawn"]  # a fixture


# What is left of the connections when the first or the second gate is open.
MASKS = (
    torch.block_diag(torch.ones(2, 3), torch.ones(2, 3)),
    torch.block_diag(torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 0)),
)


class Blocks(nn.Module):
    """A user's own layer of 6 -> 4 channels, whose open gates cut connections; it gives images on as they are."""

    def __init__(self, gates: int = 2) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.full((gates,), -1.0))
        self.other = nn.Parameter(torch.ones(3))

    def membership(self) -> Tensor:
        is_open = (self.gates >= 0).float() + self.gates - self.gates.detach()
        parts = [1 - gate + gate * mask for gate, mask in zip(is_open, MASKS, strict=False)]
        return parts[0] * parts[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


class Turn(Callback):
    """Sets the gates of layer ``backbone.0`` after these steps."""

    def __init__(self, plan: dict[int, tuple[float, ...]]) -> None:
        self.plan = plan

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step in self.plan:
            with torch.no_grad():
                pl_module.backbone[0].gates.copy_(torch.tensor(self.plan[trainer.global_step]))


def model(*layers: nn.Module) -> LightningModule:
    return classifier(head(*(layers or (Blocks(),)), channels=1), lr=1e-9, weight_decay=0.0)


def run(folder: Path, *callbacks: Callback, network: LightningModule | None = None, **options: Any) -> Trainer:
    return train(network or model(), digits(), folder, *callbacks, **{"limit_val_batches": 0, **options})


class TestMembership:
    """What the tests below count by hand."""

    @pytest.mark.parametrize(
        ("gates", "rows"),
        [
            ((-1.0, -1.0), ["111111"] * 4),
            ((1.0, -1.0), ["111000", "111000", "000111", "000111"]),
            ((-1.0, 1.0), ["111000", "000111", "000000", "000000"]),
        ],
    )
    def test_blocks(self, gates: tuple[float, float], rows: list[str]) -> None:
        layer = Blocks()
        layer.gates.data = torch.tensor(gates)
        assert ["".join(f"{value:.0f}" for value in row) for row in layer.membership().tolist()] == rows


class TestScalars:
    def test_by_hand(self, tmp_path: Path) -> None:
        """The gates are turned in the second epoch, one of them forth and back."""
        plan = {5: (1.0, -2.0), 6: (1.0, 2.0), 7: (0.5, -3.0)}
        found = scalars(run(tmp_path, Turn(plan), GroupTracker(), max_epochs=3))
        assert found["groups/backbone.0"] == {3: 1, 7: 2, 11: 2}
        assert found["group_connections/backbone.0"] == {3: 24, 7: 12, 11: 12}
        assert found["group_flips/backbone.0"] == {3: 0, 7: 3, 11: 0}
        assert found["gates/backbone.0/0"] == {3: -1, 7: 0.5, 11: 0.5}
        assert found["gates/backbone.0/1"] == {3: -1, 7: -3, 11: -3}
        assert found["groups_connected"] == {3: 1, 7: 0.5, 11: 0.5}
        assert not [tag for tag in found if "other" in tag]

    def test_many_gates_are_summarised(self, tmp_path: Path) -> None:
        layer = Blocks(17)
        layer.gates.data = torch.linspace(-4, 0, 17)
        found = scalars(run(tmp_path, GroupTracker(), network=model(layer)))
        assert {tag: values[3] for tag, values in found.items() if tag.startswith("gates/")} == {
            "gates/backbone.0/least": -4,
            "gates/backbone.0/mean": -2,
            "gates/backbone.0/most": 0,
        }

    def test_a_layer_without_gates(self, tmp_path: Path) -> None:
        class Fixed(Blocks):
            def membership(self) -> Tensor:
                return torch.block_diag(torch.ones(1, 2), torch.ones(2, 1), torch.ones(1, 1))

        found = scalars(run(tmp_path, GroupTracker(), network=model(Fixed(), Blocks())))
        assert found["groups/backbone.0"] == {3: 3}
        assert found["group_flips/backbone.1"] == {3: 0}
        assert found["groups_connected"] == {3: pytest.approx((5 + 24) / (16 + 24))}
        assert "group_flips/backbone.0" not in found

    def test_of_dgconv(self, tmp_path: Path) -> None:
        network = model(
            nn.Conv2d(1, 8, 3),
            DGConv2d(8, 12, 3, gate_init="depthwise"),
            nn.Conv2d(12, 1, 1),
        )
        found = scalars(run(tmp_path, GroupTracker(), network=network))
        assert found["groups/backbone.1"] == {3: 4}
        assert found["group_connections/backbone.1"] == {3: 24}
        assert set(found) >= {"gates/backbone.1/0", "gates/backbone.1/1"}

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_compiled(self, accumulate: int, tmp_path: Path) -> None:
        torch.compiler.reset()
        network = model()
        network.backbone = torch.compile(network.backbone, backend="eager")
        found = scalars(run(tmp_path, GroupTracker(), network=network, accumulate_grad_batches=accumulate))
        assert [*found["groups/backbone.0"].values()] == [1]

    def test_other_loggers_get_them(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path)
        with warns_once("no pictures are drawn"):
            fit(model(), None, GroupTracker(), logger=logger)
        with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
            assert [row["groups/backbone.0"] for row in csv.DictReader(file) if row["groups/backbone.0"]] == ["1.0"]


class TestFigures:
    def test_show_all_epochs(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        trainer = run(tmp_path, Turn({7: (1.0, -2.0)}), GroupTracker(), max_epochs=3)
        assert pictures(trainer) == {"group_counts": [11], "group_membership/backbone.0": [11]}
        over_time, at_end, *_ = drawn["group_counts"].axes
        assert over_time.collections[0].get_array().tolist() == [[1, 1, 2, 2]]
        assert [bar.get_width() for bar in at_end.patches] == [4, 2]  # as many as are possible, and as there are
        shown = drawn["group_membership/backbone.0"].axes[0].images[0].get_array()
        assert shown.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
        assert "backbone.0" in texts(drawn["group_membership/backbone.0"])

    def test_as_often_as_wanted(self, tmp_path: Path) -> None:
        trainer = run(tmp_path, GroupTracker(every_n_epochs=2), max_epochs=5)
        assert pictures(trainer)["group_counts"] == [7, 15, 19]

    def test_are_not_drawn_again_by_a_test(self, tmp_path: Path) -> None:
        network = model()
        trainer = run(tmp_path, GroupTracker(), network=network)
        trainer.test(network, digits(), verbose=False)
        assert pictures(trainer)["group_counts"] == [3]

    def test_outside_of_a_training(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        tracker = GroupTracker()
        trainer = run(tmp_path, network=model(), limit_val_batches=1)
        trainer.callbacks.append(tracker)
        trainer.validate(model(), digits(), verbose=False)
        assert pictures(trainer)["group_counts"] == [4]
        assert [axes.get_title() for axes in drawn["group_counts"].axes] == ["Groups"]

    def test_says_what_the_budget_is(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        network = model()
        network.hparams["group_budget"] = 4
        run(tmp_path, GroupTracker(), network=network)
        assert "100.0% of all pairs of channels are connected; the budget is 25.0%" in texts(drawn["group_counts"])

    def test_of_the_layers_that_are_named(self, tmp_path: Path) -> None:
        network = model(*[Blocks() for _ in range(3)])
        trainer = run(tmp_path, GroupTracker(layers=["*.1"]), network=network)
        assert set(pictures(trainer)) == {"group_counts", "group_membership/backbone.1"}
        with pytest.raises(ValueError, match=r"layers='conv' matches no layer that learns its groups; there are back"):
            run(tmp_path, GroupTracker(layers=["conv"]), network=network)


class TestResume:
    @pytest.mark.parametrize("cut", [8, 6])
    def test_goes_on_as_if_it_had_not_stopped(self, cut: int, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        """Also from the middle of an epoch, whose first half had a flip."""
        plan = {3: (1.0, -1.0), 5: (1.0, 1.0), 7: (-1.0, -1.0)}

        class Save(Callback):
            def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
                if trainer.global_step == cut and cut % 4:
                    trainer.save_checkpoint(tmp_path / "half.ckpt")

            def on_train_end(self, trainer: Trainer, *args: Any) -> None:
                if not (tmp_path / "half.ckpt").exists():
                    trainer.save_checkpoint(tmp_path / "half.ckpt")

        whole = scalars(run(tmp_path / "whole", Turn(plan), GroupTracker(), max_epochs=3))
        counts = np.array(drawn["group_counts"].axes[0].collections[0].get_array())
        epochs = -(-cut // 4)
        run(tmp_path / "half", Turn(plan), GroupTracker(), Save(), max_epochs=epochs)
        assert isinstance(torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"], dict)
        rest = run(tmp_path / "rest", Turn(plan), GroupTracker(), max_epochs=3, ckpt_path=str(tmp_path / "half.ckpt"))
        assert np.array(drawn["group_counts"].axes[0].collections[0].get_array()).tolist() == counts.tolist()
        found = scalars(rest)
        for tag in ("groups/backbone.0", "group_flips/backbone.0", "gates/backbone.0/0"):
            assert found[tag] == {step: value for step, value in whole[tag].items() if step >= cut}

    def test_another_training_has_its_own_history(self, tmp_path: Path, drawn: dict[str, Figure]) -> None:
        tracker, other = GroupTracker(), model()
        run(tmp_path / "one", Turn({2: (1.0, -1.0)}), tracker, max_epochs=3)
        with torch.no_grad():
            other.backbone[0].gates.copy_(torch.tensor([1.0, -1.0]))
        run(tmp_path / "two", tracker, network=other, max_epochs=1)
        assert drawn["group_counts"].axes[0].collections[0].get_array().tolist() == [[2, 2]]
        run(tmp_path / "three", tracker, network=model(nn.Identity(), Blocks()), max_epochs=2)
        assert drawn["group_counts"].axes[0].collections[0].get_array().tolist() == [[1, 1, 1]]


def test_no_grouped_layer(tmp_path: Path) -> None:
    with warns_once("GroupTracker found no layer that learns its groups"):
        trainer = run(tmp_path, GroupTracker(), network=classifier(static()))
    assert pictures(trainer) == {}
    assert trainer.global_step == 4


def test_refuses() -> None:
    with pytest.raises(ValueError, match="every_n_epochs=0 must be at least 1"):
        GroupTracker(every_n_epochs=0)
