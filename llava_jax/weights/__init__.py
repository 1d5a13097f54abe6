"""Weights from and to PyTorch's world: key tables as data, and files that stream."""
