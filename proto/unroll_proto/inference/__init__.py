"""The Open Inference Protocol over gRPC: clients made for it work unchanged."""
