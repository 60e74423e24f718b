"""ONNX graphs of PyTorch modules, by torch's own exporters."""

import io
import warnings

import torch
from torch import nn


def exported(network: nn.Module, shape: tuple[int, ...], dynamic: bool, opset: int) -> bytes:
    """Returns torch's own export of a network from `x` of some shape to `y`; dynamic: with open batch and time."""
    file = io.BytesIO()
    axes = {"x": {0: "first", 1: "second"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(shape),),
            file,  # type: ignore[arg-type]  # of the other exporter alone
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
            opset_version=opset,
        )
    return file.getvalue()
