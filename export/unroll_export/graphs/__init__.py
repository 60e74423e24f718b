"""The model artifacts of a bundle, each made from a SimpleRNN: ONNX and TorchScript."""
