"""Golden files: what must come out, frozen. `python -m tests.golden.write` writes all but refused.

What they expect is worked out by `oracle.py` and `pictures.py`, which share no code with the
package and reproduce the recorded reference wherever that is at hand; refusals are by hand.
"""
