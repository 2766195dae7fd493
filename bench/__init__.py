"""Rivals side by side with Luthier on the same work.

`python -m bench` (or `make bench`) measures everything and writes docs/benchmarks.md; `python -m bench.NAME` measures
one. Results are committed under bench/results with their conditions.

    sft full dpo    races: race.py drives processes step by step (protocol.py), summary.py takes medians
    memory scale    what it costs; planned.py and needed.py are the formulas it is held against
    curves quality  is it the same, is it as good
    profile search  where the time goes; what TRL's best setting is
    gpu             an 8B-shaped model on one GPU
"""
