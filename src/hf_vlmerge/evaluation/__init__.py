"""Evaluation: retrieval and plots."""
