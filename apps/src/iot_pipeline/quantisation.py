"""Static int8: a network whose layers see 256 values each, for an engine to run as integers.

The values that go into a layer are cut to a range that was measured on images (`measure_ranges`)
and rounded to 256 steps; weights are rounded to 255 steps, by output channel. torch computes this
in floats. ONNX has a pair of operators for it (QuantizeLinear, DequantizeLinear), from which ONNX
Runtime and OpenVINO make integer kernels, so both run the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from iot_pipeline.model import ModelError, Ranges


def _layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each layer that has a kernel, with its name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield name, module


def measure_ranges(network: nn.Module, batches: Iterable[Tensor]) -> Ranges:
    """The smallest and largest value that goes into each layer.

    Args:
        network: in evaluation mode.
        batches: normalised floats (n, 3, height, width). A thousand images of all classes do.
    """
    ranges: dict[str, tuple[float, float]] = {}
    names = {module: name for name, module in _layers(network)}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = ranges.get(names[module], (0.0, 0.0))
        values = inputs[0]
        ranges[names[module]] = (min(low, float(values.min())), max(high, float(values.max())))

    hooks = [module.register_forward_pre_hook(look) for module in names]
    try:
        with torch.inference_mode():
            for batch in batches:
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return ranges


def quantise(network: nn.Module, ranges: Ranges) -> nn.Module:
    """A copy of the network that computes as int8 kernels will.

    Args:
        network: in evaluation mode.
        ranges: of every layer, as `measure_ranges` gives them.

    Raises:
        ModelError: the ranges are of another network.
    """
    folded = fold_batch_norm(network)
    layers = dict(_layers(folded))
    if set(layers) != set(ranges):
        raise ModelError(
            "activation_ranges are not of this network: they miss "
            f"{sorted(set(layers) - set(ranges))} and have {sorted(set(ranges) - set(layers))}"
        )
    for name, layer in layers.items():
        _replace(folded, name, _Quantised(layer, *ranges[name]))
    return folded.eval()


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


class _Quantised(nn.Module):  # type: ignore[misc]
    """A convolution or linear layer whose input and weights are rounded to what int8 can hold."""

    def __init__(self, layer: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.layer = layer
        # Zero has to be exact: padding is zero, and so is most of what a ReLU lets through.
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale = (high - low) / 255 or 1.0
        self.zero = round(-low / self.scale)
        weights = layer.weight.detach()
        # A channel that is zero all over still needs a scale.
        scales = weights.abs().flatten(1).amax(1).clamp(min=1e-12) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(len(scales), dtype=torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero, 0, 255)
        layer = self.layer
        weights = torch.fake_quantize_per_channel_affine(
            layer.weight, self.scales, self.zeros, 0, -128, 127
        )
        if isinstance(layer, nn.Conv2d):
            return nn.functional.conv2d(
                *(rounded, weights, layer.bias),
                *(layer.stride, layer.padding, layer.dilation, layer.groups),
            )
        return nn.functional.linear(rounded, weights, layer.bias)
