"""The models served: versions, their index, their life."""
