"""Images whose first pixels are the routing weights that they get, and networks that route them so."""

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.training import classifier, head


class Coded(nn.Module):
    """A router that reads the weights of layer ``row`` in row ``row`` of the image."""

    def __init__(self, kernels: int, row: int = 0) -> None:
        super().__init__()
        self.kernels, self.row = kernels, row

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, self.row, : self.kernels]


class Routes(nn.Module):
    """A user's own layer: routes images, and gives them on as they are."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def routers(self) -> dict[str, nn.Module]:
        return {"router": self.router}

    def forward(self, x: Tensor) -> Tensor:
        self.router(x)
        return x


def routed(*kernels: int) -> LightningModule:
    """Classify with layers ``backbone.0``, ``backbone.1``, ..., of so many kernels."""
    layers = [Routes(Coded(count, row)) for row, count in enumerate(kernels)]
    return classifier(head(*layers, channels=1))


def images(*layers: Tensor) -> Tensor:
    """Write the routing weights ``(N, K)`` of each layer into images ``(N, 1, 8, 8)``."""
    found = torch.zeros(len(layers[0]), 1, 8, 8)
    for row, weights in enumerate(layers):
        found[:, 0, row, : weights.shape[1]] = weights
    return found


class Data(LightningDataModule):
    """Validates and tests on these images in their order, and trains on four batches of four others."""

    def __init__(
        self, pictures: Tensor, labels: Tensor, batch_size: int = 3, class_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.batch_size, self.class_names = batch_size, class_names
        self.train_set = TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 10)
        self.val_set: Dataset = TensorDataset(pictures, labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, 4)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.batch_size)

    test_dataloader = val_dataloader


def data(*layers: Tensor, classes: int = 4, **options: object) -> Data:
    return Data(images(*layers), torch.arange(len(layers[0])) % classes, **options)  # type: ignore[arg-type]


def softmax_rows(count: int, kernels: int, scale: float = 2.0) -> Tensor:
    return torch.softmax(scale * torch.randn(count, kernels), dim=1)
