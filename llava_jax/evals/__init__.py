"""One file a benchmark: its questions, how they are asked, how answers are scored.

Nothing here knows a model: what generates is passed in.
"""
