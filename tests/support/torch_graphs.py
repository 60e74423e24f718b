"""ONNX graphs of PyTorch modules, by torch's own exporters."""

import io
import warnings

import pytest
import torch
from torch import nn


def exported(network: nn.Module, shape: tuple[int, ...], dynamic: bool, opset: int, captured: bool = False) -> bytes:
    """Returns torch's own export of a network from `x` to `y`.

    Args:
        network: The network.
        shape: Shape of the example of `x`.
        dynamic: True to leave its first two dimensions open.
        opset: Operator set.
        captured: True for the exporter that captures by torch.export, False for the one that traces.
    """
    if captured:
        pytest.importorskip("onnxscript", reason="onnxscript is not installed, which this exporter needs")
        open_ = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}} if dynamic else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network.eval(),
                (torch.zeros(shape),),
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=open_,
                opset_version=opset,
                verbose=False,
            )
        assert program is not None
        return bytes(program.model_proto.SerializeToString())
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
