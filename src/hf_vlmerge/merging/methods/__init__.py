"""Merge methods: one file each. The registry scans this folder, so a new file is a new method."""
