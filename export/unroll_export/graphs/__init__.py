"""Model artifacts of a bundle, built from a recurrent classifier: ONNX and TorchScript."""
