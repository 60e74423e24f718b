"""The soak test: all kinds of calls and faults for half an hour, with all answers checked bit for bit (`make soak`)."""
