"""Distances between members: one file each. The registry scans this folder, so a new file is a new distance.

A distance is a program whose result is a pair: ``terms``, the reduction to sum over a tensor (or a layer, or the whole
model), and ``value``, what becomes of these sums. Of more than two members at once, l2 and cosine are means over pairs.
"""
