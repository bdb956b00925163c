"""How the groups of channels change while layers learn them, as in DGConv's paper (arXiv 1908.05867)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn

from dyn_lightning.analysis import figures
from dyn_lightning.analysis.groups import count_groups, gates
from dyn_lightning.callbacks.notices import say_once, say_without_pictures
from dyn_lightning.callbacks.pictures import Pictures, log_figure, step_of
from dyn_lightning.checks import check_count, check_globs, matches
from dyn_lightning.protocols import Grouped, named_layers

MOST_GATES = 16  # that are logged one by one; of more in a layer the least, the mean and the most are
LAYERS = 6  # whose membership is drawn, from all depths


class GroupTracker(Callback):
    """Logs, after each epoch of training, which groups each Grouped layer has.

    Scalars: ``groups/LAYER`` (of channels that are not connected with each other), ``group_connections/LAYER`` (ones in
    its membership U), ``group_flips/LAYER`` (how often one of its gates changed its sign in this epoch, looked at after
    each step), ``gates/LAYER/NUMBER`` (the parameters that U depends on), and ``groups_connected``, the part of all
    pairs of channels that is connected. Figures: ``group_membership/LAYER`` of layers from all depths, and
    ``group_counts``, which shows all layers over all epochs, also those before a resume. They are drawn at the end, and
    before it as often as takes at most 0.5 % of the time. Outside of a training there is nothing of gates.

    Args:
        layers: globs over the names of the layers whose membership is drawn; None takes six, from all depths.
        every_n_epochs: draw after every so many epochs instead, whatever it takes.

    Raises:
        ValueError: a count below 1; when a training starts, a glob that matches no such layer.
    """

    def __init__(self, layers: list[str] | None = None, every_n_epochs: int | None = None) -> None:
        if every_n_epochs is not None:
            check_count("every_n_epochs", every_n_epochs)
        self.layers = layers
        self.pictures = Pictures(every_n_epochs)
        self._epochs: list[int] = []  # that are complete; 0 is the start
        self._counts: dict[str, list[int]] = {}  # groups after each of them
        self._flips = torch.zeros(0, dtype=torch.long)  # of each gate since then
        self._gates: dict[str, list[nn.Parameter]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Give the history, so that a resumed run goes on with it."""
        return {"epochs": self._epochs, "counts": self._counts, "flips": self._flips.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history."""
        self._epochs, self._counts = list(state_dict["epochs"]), dict(state_dict["counts"])
        self._flips = torch.tensor(state_dict["flips"], dtype=torch.long)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if there are no layers to follow, or nowhere to draw."""
        self.pictures.begin()
        names = [name for name, _ in named_layers(pl_module, Grouped)]
        if names:
            check_globs("layers", self.layers or [], names, "layer that learns its groups")
        else:
            say_once(trainer, "GroupTracker found no layer that learns its groups (membership()) in the model")
        say_without_pictures(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on after a resume."""
        self._gates = {name: gates(layer) for name, layer in named_layers(pl_module, Grouped)}
        self._open = self._signs()
        if trainer.global_step == 0 or self._counts.keys() != self._gates.keys():  # another training's
            self._epochs, self._counts = [], {name: [] for name in self._gates}
        self._epochs = [epoch for epoch in self._epochs if epoch <= trainer.current_epoch]
        self._counts = {name: counts[: len(self._epochs)] for name, counts in self._counts.items()}
        same = self._flips.shape == self._open.shape and self._epochs
        self._flips = (self._flips if same else torch.zeros_like(self._open, dtype=torch.long)).to(self._open.device)
        if not self._epochs:
            self._note(trainer.current_epoch, _memberships(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the gates that changed their sign."""
        before, self._open = self._open, self._signs()
        self._flips += before != self._open

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the scalars, and draw if it is time."""
        matrices = _memberships(pl_module)
        if not matrices:
            return
        self._note(trainer.current_epoch + 1, matrices)
        flips = self._flips.split([sum(map(torch.numel, values)) for values in self._gates.values()])
        self._log_groups(pl_module, matrices)
        for (name, values), changed in zip(self._gates.items(), flips, strict=True):
            if values:
                gates = {f"gates/{name}/{key}": value for key, value in _values(values).items()}
                pl_module.log_dict({f"group_flips/{name}": changed.sum().float(), **gates}, sync_dist=True)
        self._flips.zero_()
        step = step_of(trainer) - 1  # as Lightning counts at the end of an epoch
        self.pictures.offer(trainer, partial(self._draw, trainer, pl_module, step, matrices))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last epoch."""
        self.pictures.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the last complete epoch."""
        self.pictures.end()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw, outside of a training."""
        self._show_alone(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw, outside of a training."""
        self._show_alone(trainer, pl_module)

    def _show_alone(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = _memberships(pl_module)
        if trainer.state.fn == TrainerFn.FITTING or self._gates or not matrices:  # a training draws at its end
            return
        now = {name: count_groups(matrix) for name, matrix in matrices.items()}
        if self._counts.keys() != matrices.keys():  # no history of this model
            self._epochs, self._counts = [], {name: [] for name in matrices}
        if now != {name: counts[-1] if counts else None for name, counts in self._counts.items()}:
            # The best checkpoint is saved before its epoch is noted.
            self._note(self._epochs[-1] + 1 if self._epochs else 0, matrices)
        self._log_groups(pl_module, matrices)
        self.pictures.offer(trainer, partial(self._draw, trainer, pl_module, step_of(trainer), matrices))

    def _log_groups(self, pl_module: LightningModule, matrices: dict[str, Tensor]) -> None:
        ones = {name: float(matrix.count_nonzero()) for name, matrix in matrices.items()}
        values = {f"groups/{name}": float(counts[-1]) for name, counts in self._counts.items()}
        values |= {f"group_connections/{name}": count for name, count in ones.items()}
        values["groups_connected"] = _connected(matrices)
        pl_module.log_dict(values, sync_dist=True)  # the same on every rank, so their mean is the value

    def _note(self, epoch: int, matrices: Mapping[str, Tensor]) -> None:
        self._epochs.append(epoch)
        for name, matrix in matrices.items():
            self._counts[name].append(count_groups(matrix))

    def _draw(self, trainer: Trainer, pl_module: LightningModule, step: int, matrices: dict[str, Tensor]) -> None:
        most = {name: min(matrix.shape) for name, matrix in matrices.items()}
        title = f"{_connected(matrices):.1%} of all pairs of channels are connected"
        if divisor := pl_module.hparams.get("group_budget"):
            title += f"; the budget is {1 / divisor:.1%}"
        draw = partial(figures.group_counts, self._counts, self._epochs, most, title)
        log_figure(trainer, "group_counts", draw, step)
        names = list(matrices)
        shown = figures.spread(names, LAYERS) if self.layers is None else [n for n in names if matches(n, self.layers)]
        for name in shown:
            log_figure(trainer, f"group_membership/{name}", partial(figures.membership, name, matrices[name]), step)

    def _signs(self) -> Tensor:
        values = [gate.detach().flatten() for layer in self._gates.values() for gate in layer]
        return torch.cat(values) >= 0 if values else torch.zeros(0, dtype=torch.bool)


def _connected(matrices: Mapping[str, Tensor]) -> float:
    """Give the part of all pairs of channels that is connected."""
    ones = sum(int(matrix.count_nonzero()) for matrix in matrices.values())
    return ones / sum(matrix.numel() for matrix in matrices.values())


def _memberships(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: layer.membership().detach().cpu() for name, layer in named_layers(model, Grouped)}


def _values(parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    """Give a layer's gates by number, or what they are like where they are many."""
    gates = torch.cat([parameter.detach().flatten() for parameter in parameters])
    if len(gates) <= MOST_GATES:
        return {str(number): gate for number, gate in enumerate(gates)}
    return {"least": gates.min(), "mean": gates.mean(), "most": gates.max()}
