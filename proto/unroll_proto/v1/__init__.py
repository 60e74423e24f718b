"""Generated code of the protobuf package `unroll.v1`; `make proto` regenerates it."""
