"""Training of recurrent classifiers, and their export to ONNX and TorchScript with proof of parity."""

from unroll_export.model import SimpleGRU, SimpleLSTM, SimpleRNN

__all__ = ["SimpleGRU", "SimpleLSTM", "SimpleRNN"]
