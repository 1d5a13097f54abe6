"""Golden files: what must come out, frozen. `python -m tests.golden.write` writes the JSON ones.

What they expect is worked out by `oracle.py` and `tile_oracle.py`, which share no code with the
package and reproduce the recorded reference wherever that is at hand.
"""
