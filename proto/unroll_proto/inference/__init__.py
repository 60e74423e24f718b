"""The Open Inference Protocol over gRPC, so that clients made for it work unchanged."""
