"""The network in torch: a timm ResNet-18 for 32x32 pictures, which every engine starts from.

Runs on PyTorch 1.13 (Debian 12) and later. Nothing from outside is unpickled: weights are
safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from iot_pipeline.model import Model, ModelError


def cifar_resnet18(
    channels: Sequence[int] = (64, 128, 256, 512), num_classes: int = 10
) -> nn.Module:
    """A timm `resnet18` whose stem keeps the resolution of 32x32 images, with random weights.

    The first convolution is 3x3 with stride 1 instead of 7x7 with stride 2, and there is no
    pooling after it: what everybody changes for CIFAR-10, first in section 4.2 of "Deep Residual
    Learning" (https://arxiv.org/abs/1512.03385).

    Args:
        channels: width of each of the four stages; the stem is always 64 wide.
        num_classes: number of outputs.

    Returns:
        A module from floats (n, 3, h, w) to logits (n, num_classes).
    """
    network: nn.Module = timm.create_model(
        "resnet18", num_classes=num_classes, channels=tuple(channels)
    )
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def load_network(model: Model) -> nn.Module:
    """The network with the model's weights, in single precision and ready to evaluate.

    Raises:
        ModelError: the weights do not fit.
    """
    network = cifar_resnet18(model.config.channels, len(model.config.labels))
    try:
        # Half precision in the file becomes single precision in the network.
        network.load_state_dict(safetensors.torch.load(model.weights))
    except Exception as error:  # A damaged file fails in any way it likes.
        raise ModelError(f"{model.name}: {model.weights_name} does not fit: {error}") from error
    return network.eval()


class FromPixels(nn.Module):  # type: ignore[misc]
    """A network with all that surrounds it, so that an engine gets bytes and gives probabilities.

    From RGB bytes (n, height, width, 3) to probabilities (n, classes).
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB bytes (n, height, width, 3) to floats (n, 3, height, width)."""
        return (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, classify, and turn logits into probabilities."""
        images = self.normalise(pixels)
        # Half precision ends before the softmax, whose probabilities are to add up to one.
        logits = self.network(images.to(next(self.network.parameters()).dtype))
        return torch.softmax(logits.float(), dim=1)
