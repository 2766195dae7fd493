"""Rivals side by side with Luthier on the same work.

`python -m bench.sft` (or `make bench`) measures; results are committed under bench/results with their conditions.
"""
