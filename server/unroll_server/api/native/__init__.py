"""unroll.v1.UnrollService."""
