"""The proof that every model artifact computes what eager PyTorch computes: cases, runners, the gate."""
