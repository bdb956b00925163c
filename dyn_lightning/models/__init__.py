"""Networks by name."""

from dyn_lightning.models.backbone import MODELS, build_backbone
from dyn_lightning.models.cifar_resnet import CifarResNet

__all__ = ["MODELS", "CifarResNet", "build_backbone"]
