"""One file, one parallel strategy behind contracts/strategy.py."""
