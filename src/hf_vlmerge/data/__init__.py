"""Data: the embedded data set `shapes`, collators and a tiny tokenizer."""
