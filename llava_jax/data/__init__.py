"""Conversations and pictures from any source, to packed batches that any number of hosts share."""
