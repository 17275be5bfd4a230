"""Merging: one output tensor is made from N input tensors, optionally with a base and statistics of the inputs."""
