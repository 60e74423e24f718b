"""Import of ONNX files: graphs of one timestep whose states are among their inputs and outputs."""
