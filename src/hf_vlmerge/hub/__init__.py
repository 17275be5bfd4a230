"""Publishing: model cards."""
