"""Each module drives one trainer step by step for bench/sft.py (the protocol: bench/protocol.py)."""
