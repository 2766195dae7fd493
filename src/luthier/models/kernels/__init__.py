"""Fused versions of the model's operations, each beside its plain twin in the room above."""
