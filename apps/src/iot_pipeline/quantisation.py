"""Static int8: a network whose layers see 256 values each, for an engine to run as integers.

Values between layers are cut to a range that was measured on images (`measure_ranges`) and rounded
to 256 steps; weights are rounded to 127 steps, by output channel. torch computes this in floats.
ONNX has a pair of operators for it (QuantizeLinear, DequantizeLinear), from which ONNX Runtime and
OpenVINO make integer kernels, so both run the same numbers, on every processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from iot_pipeline.model import ModelError, Ranges

LARGEST_WEIGHT = 63
"""Weights are whole numbers of at most this size: 7 bits. A processor without VNNI adds two
products of an unsigned and a signed byte in 16 bits (`vpmaddubsw`), which saturate beyond 32,767.
Two of 255 x 127 do that, two of 255 x 63 never."""

INPUT = "input"
"""Stands for the network's input among the names of ranges."""

POINTS = {"act1", "act2", "bn2", "downsample", "global_pool"}
"""timm's names, in a ResNet, of what gives values to a layer or to an addition. Both terms of an
addition are rounded: ONNX Runtime takes integer kernels for nothing less."""


def _points(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in network.named_modules():
        if name.rpartition(".")[2] in POINTS and not isinstance(module, nn.Identity):
            yield name, module


def measure_ranges(network: nn.Module, batches: Iterable[Tensor]) -> Ranges:
    """The smallest and largest value at each point of the network.

    Args:
        network: in evaluation mode.
        batches: normalised floats (n, 3, height, width). A thousand images of all classes do.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def look(name: str, values: Tensor) -> None:
        # Zero has to be exact: padding is zero, and so is most of what a ReLU lets through.
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = (min(low, float(values.min())), max(high, float(values.max())))

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, values: look(name, values)

    hooks = [module.register_forward_hook(hook(name)) for name, module in _points(network)]
    try:
        with torch.inference_mode():
            for batch in batches:
                look(INPUT, batch)
                network(batch)
    finally:
        for each in hooks:
            each.remove()
    return ranges


def quantise(network: nn.Module, ranges: Ranges) -> nn.Module:
    """A copy of the network that computes as int8 kernels will.

    Args:
        network: in evaluation mode.
        ranges: of every point, as `measure_ranges` gives them.

    Raises:
        ModelError: the ranges are of another network.
    """
    points = [name for name, _ in _points(network)]
    if {INPUT, *points} != set(ranges):
        raise ModelError(
            "activation_ranges are not of this network: they differ in "
            f"{', '.join(sorted({INPUT, *points} ^ set(ranges)))}; measure them again with "
            "apps/training/calibrate.py"
        )
    folded = fold_batch_norm(network)
    for name, layer in list(folded.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            _replace(folded, name, _RoundedWeights(layer))
    for name in points:
        rounded = nn.Sequential(folded.get_submodule(name), _Rounded(*ranges[name]))
        _replace(folded, name, rounded)
    return nn.Sequential(_Rounded(*ranges[INPUT]), folded).eval()


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them."""
    folded = copy.deepcopy(network).eval()
    before: tuple[str, nn.Module] = ("", nn.Identity())
    # timm registers each batch norm right after its convolution.
    for name, module in list(folded.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            _replace(folded, before[0], fuse_conv_bn_eval(before[1], module))
            _replace(folded, name, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            before = (name, module)
    return folded


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent) if parent else network, leaf, module)


class _Rounded(nn.Module):  # type: ignore[misc]
    """Cuts values to a range and rounds them to 256 steps."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        # A point that nothing passes still needs a scale.
        self.scale = (high - low) / 255 or 1.0
        self.zero = round(-low / self.scale)

    def forward(self, values: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero, 0, 255)


class _RoundedWeights(nn.Module):  # type: ignore[misc]
    """A convolution or linear layer whose weights are rounded, by output channel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        largest = layer.weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12)
        self.register_buffer("scales", largest / LARGEST_WEIGHT)
        self.register_buffer("zeros", torch.zeros(len(largest), dtype=torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        layer = self.layer
        # ONNX knows no narrower integers than 8 bits. The scales keep the weights within 7.
        weights = torch.fake_quantize_per_channel_affine(
            layer.weight, self.scales, self.zeros, 0, -128, 127
        )
        if isinstance(layer, nn.Conv2d):
            return nn.functional.conv2d(
                *(values, weights, layer.bias),
                *(layer.stride, layer.padding, layer.dilation, layer.groups),
            )
        return nn.functional.linear(values, weights, layer.bias)
