"""Tests of the picture world. What is true in a picture is read from its pixels (oracle.py)."""
