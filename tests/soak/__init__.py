"""A soak: everything at once for half an hour, faults included, every answer checked to the bit (`make soak`)."""
