"""One file, one optimizer: `train.optimizer: adamw_8bit` is `adamw_8bit.py` and the one Stepping in it."""
