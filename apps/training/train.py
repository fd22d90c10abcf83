"""Train the image classifier on CIFAR-10 and on drawings, and export its weights.

    python train.py --data train.tar.xz --val val.tar.xz --max-minutes 90

Runs on a small CPU: the images sit in memory as bytes, augmentation is
vectorised, and the resolution grows as training goes on. The learning rate
follows one cycle whose progress is the larger of the share of epochs done and the
share of `--max-minutes` used, so a budget of time ends in a trained model too.
A checkpoint is written after every epoch; the same command resumes from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from drawings import drawings_array
from images import labelled_images
from torch import Tensor, nn
from torch.nn import functional

from iot_pipeline.model import SHIPPED_WEIGHTS
from iot_pipeline.network import cifar_resnet18
from iot_pipeline.quantisation import measure_ranges
from iot_pipeline.schema import CLASSES

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

DRAWINGS_SEED = 7
"""Not the sample's seed: what ships as the sample is never trained on."""

RESOLUTIONS = ((0.0, 24), (0.5, 28), (0.75, 32))
"""From which share of training on images are scaled to which edge, pixels.

Small images cost less while the learning rate is high and detail is wasted. The last quarter runs
at the size that the model will meet, so that its batch norm statistics are right.
"""


@dataclass
class Data:
    """Images uint8 (n, 32, 32, 3) RGB and their class numbers (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(source: Path, device: torch.device) -> Data:
    """Read 32x32 images from a folder or a tar archive of `<class>/<image>`.

    Raises:
        OSError, tarfile.TarError: the source cannot be read.
        ValueError: it holds no image, or one of another size.
    """
    images = labelled_images(source)
    pixels = np.stack([np.asarray(image) for image, _ in images])
    if pixels.shape[1:] != (32, 32, 3):
        raise ValueError(f"the images in {source} are {pixels.shape[1:]}, not 32x32")
    numbers = [CLASSES.index(label) for _, label in images]
    return Data(torch.from_numpy(pixels).to(device), torch.tensor(numbers, device=device))


def drawn(per_class: int, device: torch.device) -> Data:
    """Drawings to train on, none of which is in the shipped sample."""
    images, labels = drawings_array(per_class, DRAWINGS_SEED)
    return Data(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))


def augment(images: Tensor, generator: torch.Generator, shift: int = 4) -> Tensor:
    """Shift and flip each image by its own random numbers.

    Args:
        images: uint8 (n, size, size, 3).
        generator: random numbers, on the CPU.
        shift: largest shift, pixels; what comes in from outside is mirrored.

    Returns:
        Normalised floats (n, 3, size, size) in channels-last memory order.
    """
    n, size = images.shape[0], images.shape[1]

    def random(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n, 1), generator=generator).to(images.device)

    def mirrored(index: Tensor) -> Tensor:
        return (size - 1) - ((size - 1) - index.abs()).abs()

    span = torch.arange(size, device=images.device)
    rows = mirrored(span + random(-shift, shift + 1))
    columns = mirrored(span + random(-shift, shift + 1))
    columns = torch.where(random(0, 2).bool(), columns.flip(1), columns)
    each = torch.arange(n, device=images.device)[:, None, None]
    return normalise(images[each, rows[:, :, None], columns[:, None, :]])


def normalise(images: Tensor) -> Tensor:
    """uint8 (n, h, w, 3) to floats (n, 3, h, w) of mean 0 and deviation 1, channels last."""
    scale = 255 * torch.tensor(STD, device=images.device)
    shift = torch.tensor(MEAN, device=images.device) / torch.tensor(STD, device=images.device)
    return (images / scale - shift).permute(0, 3, 1, 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only, not on biases and batch norms."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def one_cycle(progress: float, peak: float, warm: float = 0.2) -> float:
    """Learning rate at `progress` (0 to 1): up to `peak` at `warm`, then down to zero."""
    if progress < warm:
        return peak * (0.05 + 0.95 * progress / warm)
    return peak * max(0.0, (1 - progress) / (1 - warm))


def resolution(progress: float) -> int:
    """Edge of the training images at `progress` (0 to 1), pixels."""
    return [edge for start, edge in RESOLUTIONS if progress >= start][-1]


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random disjoint index batches over `count` rows; the incomplete last one is left out."""
    order = torch.randperm(count, generator=generator)
    yield from order[: count - count % size].split(size)


def accuracy(model: nn.Module, data: Data, batch_size: int = 250) -> float:
    """Share of `data` that the model gets right, 0 to 1; leaves the model in evaluation mode."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            found = model(normalise(data.images[rows])).argmax(1)
            right += int((found == data.labels[rows]).sum())
    return right / len(data)


RANGE_IMAGES = 1000
"""How many training images the ranges for int8 are measured on; more hardly move them."""


def activation_ranges(model: nn.Module, data: Data) -> dict[str, list[float]]:
    """The range of values at each point of the network, on images spread over all of `data`.

    Leaves the model in evaluation mode.
    """
    model.eval()
    images = data.images[:: max(1, len(data) // RANGE_IMAGES)]
    measured = measure_ranges(model, (normalise(part) for part in images.split(100)))
    return {layer: [round(edge, 4) for edge in pair] for layer, pair in measured.items()}


def export(
    model: nn.Module,
    data: Data,
    out: Path,
    channels: tuple[int, ...],
    training: dict[str, Any],
) -> None:
    """Write the weights in half precision and their `config.json` into `out`.

    Args:
        model: what to export; left in evaluation mode.
        data: training images, to measure the ranges for int8 on.
        out: a folder; made if it is not there. `local-dir:` of the classifier reads it.
        channels: width of the four stages.
        training: how it was trained, for the reader of `config.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = out / SHIPPED_WEIGHTS
    tensors = {
        name: (t.half() if t.is_floating_point() else t).contiguous().cpu()
        for name, t in model.state_dict().items()
        if not name.endswith("num_batches_tracked")  # used in training only
    }
    partial = weights.with_suffix(".partial")
    partial.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    config = {
        "architecture": "resnet18",
        "channels": list(channels),
        "num_classes": len(CLASSES),
        "class_names": list(CLASSES),
        "input_size": [3, 32, 32],
        "mean": list(MEAN),
        "std": list(STD),
        "weights": SHIPPED_WEIGHTS,
        "sha256": digest,
        "activation_ranges": activation_ranges(model, data),
        "training": training,
    }
    partial.replace(weights)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Trainer:
    """One training run: model, optimizer, data, and how far it is."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        torch.manual_seed(options.seed)
        self.began = time.monotonic()
        self.seconds_before = 0.0
        self.first_epoch = 0

        photographs = load(options.data, self.device)
        drawings = drawn(options.drawings, self.device)
        self.data = Data(
            torch.cat([photographs.images, drawings.images]),
            torch.cat([photographs.labels, drawings.labels]),
        )
        self.val = load(options.val, self.device)
        report(
            f"{len(photographs)} photographs, {len(drawings)} drawings, "
            f"{len(self.val)} images to validate on"
        )
        self.steps = len(self.data) // options.batch_size
        self.channels = tuple(options.width * factor for factor in (1, 2, 4, 8))
        self.model = cifar_resnet18(self.channels, len(CLASSES)).to(
            self.device, memory_format=torch.channels_last
        )
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, options.weight_decay),
            lr=options.lr,
            momentum=0.9,
            nesterov=True,
        )
        if options.checkpoint and options.checkpoint.exists():
            self._resume(options.checkpoint)

    def run(self) -> None:
        """Train to the end of the epochs or of the time; save and export after every epoch."""
        for epoch in range(self.first_epoch, self.options.epochs):
            loss = self._epoch(epoch)
            progress = self._progress(epoch, self.steps)
            # A fifth of the images shows the trend; all of them are for the end.
            every = 1 if progress >= 1 else 5
            score = accuracy(self.model, Data(self.val.images[::every], self.val.labels[::every]))
            report(
                f"== epoch {epoch + 1}, {self._seconds() / 60:.1f} min, progress {progress:.3f}: "
                f"loss {loss:.3f}, validation {score:.4f}"
            )
            if self.options.checkpoint:
                self._save(self.options.checkpoint, epoch + 1)
            training = {
                "epochs": epoch + 1,
                "complete": progress >= 1,
                "seed": self.options.seed,
                "drawings": self.options.drawings,
                "precision": self.options.precision,
            }
            export(self.model, self.data, self.options.out, self.channels, training)
            if progress >= 1:
                return

    def _seconds(self) -> float:
        """Time spent in this run and in those before the checkpoint."""
        return self.seconds_before + time.monotonic() - self.began

    def _progress(self, epoch: int, step: int) -> float:
        """How much of the training is over, 0 to 1, by epochs or by time."""
        by_epochs: float = (epoch + step / self.steps) / self.options.epochs
        by_time: float = self._seconds() / 60 / (self.options.max_minutes or math.inf)
        return min(1.0, max(by_epochs, by_time))

    def _epoch(self, epoch: int) -> float:
        """Train on all data once, or until the time is up; returns the mean loss."""
        self.model.train()
        began = printed = time.monotonic()
        losses: list[float] = []
        for step, rows in enumerate(
            batches(len(self.data), self.options.batch_size, self.generator)
        ):
            progress = self._progress(epoch, step)
            if progress >= 1:
                break
            losses.append(self._step(rows.to(self.device), progress))
            now = time.monotonic()
            if now - printed > 30:
                printed = now
                speed = len(losses) * len(rows) / (now - began)
                left = self._seconds() * (1 / progress - 1) if progress else math.inf
                report(
                    f"epoch {epoch + 1}, step {step + 1}/{self.steps}, {resolution(progress)} px: "
                    f"loss {sum(losses) / len(losses):.3f}, {speed:.0f} images/s, "
                    f"{left / 60:.0f} min left"
                )
        return sum(losses) / len(losses) if losses else math.nan

    def _step(self, rows: Tensor, progress: float) -> float:
        """One update from the images at `rows`; returns their loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(progress, self.options.lr)
        images = augment(self.data.images[rows], self.generator)
        edge = resolution(progress)
        if edge != images.shape[-1]:
            images = functional.interpolate(images, (edge, edge), mode="bilinear", antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, self.options.precision == "bf16"):
            logits = self.model(images)
        loss = functional.cross_entropy(logits.float(), self.data.labels[rows], label_smoothing=0.1)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.item())

    def _save(self, checkpoint: Path, epochs: int) -> None:
        """Write the checkpoint, whole or not at all."""
        partial = checkpoint.with_suffix(".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "epoch": epochs,
                "seconds": self._seconds(),
            },
            partial,
        )
        partial.replace(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.first_epoch = state["epoch"]
        self.seconds_before = state["seconds"]
        report(f"resumed after epoch {self.first_epoch}, {self.seconds_before / 60:.1f} min")


def report(line: str) -> None:
    """Print at once, so that a log file can be followed."""
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's description."""
    models = Path(__file__).resolve().parent.parent / "models"
    parser = argparse.ArgumentParser(
        description="Train the CIFAR-10 classifier and export its weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--data", type=Path, required=True, help="training images: folder or tar archive")
    option("--val", type=Path, required=True, help="validation images, never trained on")
    option("--out", type=Path, default=models, help="where weights and config.json go")
    option("--checkpoint", type=Path, help="state after each epoch; resumed from if it is there")
    option("--width", type=int, default=32, help="channels of the first of four stages")
    option("--epochs", type=int, default=20, help="passes over the data, at most")
    option("--max-minutes", type=float, help="end, with the learning rate at zero, after so long")
    option("--batch-size", type=int, default=128, help="images per update")
    option("--lr", type=float, default=0.15, help="peak learning rate")
    option("--weight-decay", type=float, default=5e-4, help="on convolutions and the last layer")
    option("--drawings", type=int, default=300, help="drawings per class to mix in; 0 for none")
    option("--seed", type=int, default=1, help="of weights, order and augmentation")
    option("--threads", type=int, help="CPU threads; torch's choice if not given")
    option(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of activations; bf16 is faster where the processor has avx512_bf16 or amx",
    )
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    Trainer(options).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
