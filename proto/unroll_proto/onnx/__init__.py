"""The part of ONNX that bundles hold and the engine runs, so that neither needs the onnx package."""
