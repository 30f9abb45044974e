"""What the server costs: ratios against doing the same without it, taken in one run, and bounds on memory and delay.

`python -m benchmarks` (or `make bench`) runs them on checkpoints with random weights, which cost what real ones do.
"""
