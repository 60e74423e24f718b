"""What carries the servicers to the wire, and all that is particular to it."""
