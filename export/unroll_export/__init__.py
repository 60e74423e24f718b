"""Training of SimpleRNN models, and their export to ONNX and TorchScript with proof of parity."""

from unroll_export.model import SimpleRNN

__all__ = ["SimpleRNN"]
