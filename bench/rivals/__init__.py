"""Each module drives one trainer step by step for bench/race.py (the protocol: bench/protocol.py)."""
