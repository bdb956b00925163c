"""Data modules; each knows its number of classes, channels and image size."""

from dyn_lightning.data.digits import Digits
from dyn_lightning.data.image_folder import ImageFolder
from dyn_lightning.data.module import ImageDataModule
from dyn_lightning.data.synthetic import Synthetic

__all__ = ["Digits", "ImageDataModule", "ImageFolder", "Synthetic"]
