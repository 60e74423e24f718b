"""The model artifacts of a bundle, each made from a SimpleRNN: ONNX with RNN, ONNX with Scan, TorchScript."""
