"""The part of ONNX that bundles and the engine use, so that neither needs the onnx package."""
