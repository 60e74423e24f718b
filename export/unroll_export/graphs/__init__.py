"""The model artifacts of a bundle, each made from a recurrent classifier: ONNX and TorchScript."""
