"""Checkpoints of other tools as initial weights or as models of ours, and back."""
