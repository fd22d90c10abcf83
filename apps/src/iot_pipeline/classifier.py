"""The image classifier: a timm ResNet-18 for 32x32 pictures, and where its weights come from.

Runs on PyTorch 1.13 (Debian 12) and later. Nothing from outside is unpickled: weights are
safetensors, or a pickle that torch reads with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from iot_pipeline.errors import ConfigError
from iot_pipeline.schema import CLASSES

SHIPPED_WEIGHTS = "resnet18-cifar10.safetensors"

HUB_REVISIONS = {
    # The head of main since February 2023: https://huggingface.co/edadaltocg/resnet18_cifar10
    "edadaltocg/resnet18_cifar10": "ccacbae365101b9bfa45e1f17f4acac30c2601b2",
}
"""Commits of models on the Hugging Face hub that are used when no revision is given."""

_CONFIG = "config.json"
_WEIGHTS = (SHIPPED_WEIGHTS, "model.safetensors", "pytorch_model.bin")  # the first found is taken
_SUPPORTED = "shipped, local-dir:PATH or hf-hub:OWNER/NAME"


class ModelError(ConfigError):
    """The model cannot be loaded. The message says why and what is supported."""


@dataclass(frozen=True)
class Prediction:
    """What the model sees in one image."""

    label: str
    """The likeliest class."""
    confidence: float
    """The model's probability for it, 0 to 1. Not calibrated."""


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


class Classifier:
    """A trained network with the preparation of its input and the names of its outputs."""

    def __init__(self, network: nn.Module, settings: _Settings, name: str) -> None:
        self.name = name
        """Architecture, `@`, and the first 12 hex digits of the weights file's SHA-256."""
        self.labels = settings.labels
        self._network = network.eval()
        self._size = settings.size
        self._mean = torch.tensor(settings.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(settings.std).view(1, 3, 1, 1)

    def predict(self, images: Sequence[Image.Image]) -> list[Prediction]:
        """Classify images of any size and mode, in one batch.

        Images of another size than the network's are scaled to it, without regard to their
        proportions.

        Raises:
            OSError: an image is truncated (Pillow decodes when pixels are first asked for).
        """
        if not images:
            return []
        with torch.inference_mode():
            logits = self._network(self._batch(images))
            confidences, classes = torch.softmax(logits, dim=1).max(dim=1)
        return [
            Prediction(self.labels[number], confidence)
            for number, confidence in zip(classes.tolist(), confidences.tolist(), strict=True)
        ]

    def warm_up(self) -> None:
        """Classify a grey image, so that the first real one does not wait for torch's set-up."""
        self.predict([Image.new("RGB", self._size, (128, 128, 128))])

    def _batch(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Normalised floats (n, 3, height, width)."""
        width, height = self._size
        pixels = bytearray()
        for image in images:
            rgb = image.convert("RGB")
            if rgb.size != self._size:
                rgb = rgb.resize(self._size, Image.Resampling.BICUBIC)
            pixels += rgb.tobytes()
        # Not by way of numpy: torch and numpy of different releases do not know each other.
        batch = torch.frombuffer(pixels, dtype=torch.uint8)
        batch = batch.view(len(images), height, width, 3).permute(0, 3, 1, 2)
        return (batch.float() / 255 - self._mean) / self._std


def load_classifier(
    model: str = "shipped", *, revision: str | None = None, threads: int | None = None
) -> Classifier:
    """Load a model.

    Args:
        model: where it is:

            * `shipped`: the weights that come with this package;
            * `local-dir:PATH`: a folder with `config.json` and `model.safetensors` or
              `pytorch_model.bin`;
            * `hf-hub:OWNER/NAME`: the same files in a repository on the Hugging Face hub,
              downloaded once into its cache.
        revision: for `hf-hub:` the commit, 40 hex digits, so that a model never changes under a
            running pipeline. May be left out for those in `HUB_REVISIONS`.
        threads: threads to compute with, for the whole process; torch's choice if 0 or None.

    Returns:
        The classifier, not yet warm.

    Raises:
        ModelError: the specification, the folder, the download, the settings or the weights are
            no good.
    """
    kind, separator, place = model.partition(":")
    if model == "shipped":
        folder: Traversable = importlib.resources.files("iot_pipeline.models")
    elif kind == "local-dir" and place:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model {model!r}: there is no folder {str(folder)!r}")
    elif kind == "hf-hub" and place:
        folder = _download(place, revision or HUB_REVISIONS.get(place, ""))
    else:
        hint = "" if separator else ", not the bare name of a timm model: those know other classes"
        raise ModelError(f"model {model!r} is not supported: give {_SUPPORTED}{hint}")
    if threads:
        torch.set_num_threads(threads)
    try:
        return _load(folder)
    except ModelError as error:
        raise ModelError(f"model {model!r}: {error}") from error


def _download(repository: str, revision: str) -> Path:
    """The files of a model on the hub, as a folder in the hub client's cache.

    A commit that was downloaded before is found again without a network.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ModelError(
            f"model 'hf-hub:{repository}' needs a revision, the full 40-digit commit, so that it "
            f"never changes; got {revision!r}"
        )
    try:
        import huggingface_hub
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError as error:
        raise ModelError("hf-hub models need the package huggingface_hub") from error
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[_CONFIG, *_WEIGHTS]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"cannot download 'hf-hub:{repository}' at {revision}: {error}") from error
    return Path(folder)


@dataclass(frozen=True)
class _Settings:
    """What `config.json` says: our own file, or the one timm writes for the hub."""

    architecture: str
    channels: tuple[int, ...]
    labels: tuple[str, ...]
    size: tuple[int, int]
    """Width and height, pixels, as Pillow has them."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str | None
    """Of the weights file; not checked if absent, as in files of timm."""

    @classmethod
    def read(cls, text: str) -> _Settings:
        """Read and check the file's content.

        Raises:
            ModelError: it is not JSON, lacks something, or describes another architecture.
        """
        try:
            config = json.loads(text)
            # timm keeps the preparation of images one level down.
            config = {**config.get("pretrained_cfg", {}), **config}
            labels = config.get("class_names") or config.get("label_names") or CLASSES
            _, height, width = config.get("input_size", (3, 32, 32))
            settings = cls(
                architecture=str(config["architecture"]),
                channels=tuple(map(int, config.get("channels", (64, 128, 256, 512)))),
                labels=tuple(map(str, labels)),
                size=(int(width), int(height)),
                mean=tuple(map(float, config["mean"])),
                std=tuple(map(float, config["std"])),
                sha256=config.get("sha256"),
            )
            outputs = int(config.get("num_classes", len(settings.labels)))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(f"{_CONFIG} is not usable: {error!r}") from error
        if settings.architecture != "resnet18":
            raise ModelError(f"architecture {settings.architecture!r}: only resnet18 is supported")
        if len(settings.channels) != 4 or len(settings.mean) != 3 or len(settings.std) != 3:
            raise ModelError(f"{_CONFIG} must have 4 channels, and mean and std of 3 colours")
        if outputs != len(settings.labels):
            raise ModelError(f"{outputs} outputs, but {len(settings.labels)} class names")
        return settings


def _load(folder: Traversable) -> Classifier:
    """Load settings and weights from a folder."""
    weights_file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights_file is None:
        raise ModelError(f"there is none of {', '.join(_WEIGHTS)} in {folder}")
    try:
        settings = _Settings.read((folder / _CONFIG).read_text(encoding="utf-8"))
        content = weights_file.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {folder}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if settings.sha256 not in (None, digest):
        raise ModelError(
            f"{weights_file.name} has SHA-256 {digest}, {_CONFIG} says {settings.sha256}"
        )
    network = cifar_resnet18(settings.channels, len(settings.labels))
    try:
        # Half precision in the file becomes single precision in the network.
        network.load_state_dict(_tensors(weights_file.name, content))
    except Exception as error:  # A damaged pickle fails in any way it likes.
        raise ModelError(f"{weights_file.name} does not fit: {error}") from error
    return Classifier(network, settings, f"{settings.architecture}@{digest[:12]}")


def _tensors(name: str, content: bytes) -> Mapping[str, Any]:
    """The tensors in a weights file, by name."""
    if name.endswith(".safetensors"):
        tensors: Mapping[str, Any] = safetensors.torch.load(content)
    else:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return tensors
