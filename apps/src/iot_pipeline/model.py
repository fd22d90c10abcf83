"""Where a model comes from and what its files say. Nothing here needs torch.

A model is a folder with `config.json` and weights. `network.load_network` makes a timm network of
it; an engine runs that, or what `iot-pipeline prepare-model` compiled from it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from iot_pipeline.errors import ConfigError
from iot_pipeline.schema import CLASSES

SHIPPED_WEIGHTS = "resnet18-cifar10.safetensors"

CONFIG = "config.json"
# The first found is taken. No pickles: torch before 2.6 runs what a stranger puts into one, even
# when it is told to load weights only (CVE-2025-32434).
_WEIGHTS = (SHIPPED_WEIGHTS, "model.safetensors")
_SUPPORTED = "shipped, local-dir:PATH or hf-hub:OWNER/NAME"

Ranges = Mapping[str, tuple[float, float]]
"""The smallest and the largest value at each point of the network, by the point's name."""


class ModelError(ConfigError):
    """The model cannot be loaded. The message says why and what is supported."""


@dataclass(frozen=True)
class ModelConfig:
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
    ranges: Ranges | None
    """Measured on training images, for int8; files of timm have none."""

    @classmethod
    def read(cls, text: str) -> ModelConfig:
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
                ranges=_ranges(config.get("activation_ranges")),
            )
            outputs = int(config.get("num_classes", len(settings.labels)))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(f"{CONFIG} is not usable: {error!r}") from error
        if settings.architecture != "resnet18":
            raise ModelError(f"architecture {settings.architecture!r}: only resnet18 is supported")
        if len(settings.channels) != 4 or len(settings.mean) != 3 or len(settings.std) != 3:
            raise ModelError(f"{CONFIG} must have 4 channels, and mean and std of 3 colours")
        if outputs != len(settings.labels):
            raise ModelError(f"{outputs} outputs, but {len(settings.labels)} class names")
        return settings


def _ranges(section: Any) -> Ranges | None:
    if section is None:
        return None
    return {str(layer): (float(low), float(high)) for layer, (low, high) in section.items()}


@dataclass(frozen=True)
class Model:
    """A model's files, found and read."""

    config: ModelConfig
    weights_name: str
    """Name of the weights file."""
    weights: bytes
    """The file: safetensors."""
    digest: str
    """SHA-256 of the weights, hex."""

    @property
    def name(self) -> str:
        """Architecture, `@`, and the first 12 hex digits of the weights file's SHA-256."""
        return f"{self.config.architecture}@{self.digest[:12]}"


def find_model(spec: str = "shipped", revision: str | None = None) -> Model:
    """Find a model and read its files.

    Args:
        spec: where it is:

            * `shipped`: the weights that come with this package;
            * `local-dir:PATH`: a folder with `config.json` and `model.safetensors`;
            * `hf-hub:OWNER/NAME`: the same files in a repository on the Hugging Face hub,
              downloaded once into its cache.
        revision: for `hf-hub:` the commit, 40 hex digits, so that a model never changes under a
            running pipeline.

    Raises:
        ModelError: the specification, the folder, the download or the settings are no good.
    """
    kind, separator, place = spec.partition(":")
    if spec == "shipped":
        folder: Traversable = importlib.resources.files("iot_pipeline.models")
    elif kind == "local-dir" and place:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model {spec!r}: there is no folder {str(folder)!r}")
    elif kind == "hf-hub" and place:
        folder = _download(place, revision or "")
    else:
        hint = "" if separator else ", not the bare name of a timm model: those know other classes"
        raise ModelError(f"model {spec!r} is not supported: give {_SUPPORTED}{hint}")
    try:
        return _read(folder)
    except ModelError as error:
        raise ModelError(f"model {spec!r}: {error}") from error


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
            repository, revision=revision, allow_patterns=[CONFIG, *_WEIGHTS]
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"cannot download 'hf-hub:{repository}' at {revision}: {error}") from error
    return Path(folder)


def _read(folder: Traversable) -> Model:
    weights_file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights_file is None:
        raise ModelError(
            f"there is none of {', '.join(_WEIGHTS)} in {folder}; weights that are a pickle, such "
            "as pytorch_model.bin, can run any program and are not read: docs/engines.md says how "
            "to convert them"
        )
    try:
        config = ModelConfig.read((folder / CONFIG).read_text(encoding="utf-8"))
        content = weights_file.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {folder}: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if config.sha256 not in (None, digest):
        raise ModelError(f"{weights_file.name} has SHA-256 {digest}, {CONFIG} says {config.sha256}")
    return Model(config, weights_file.name, content, digest)
