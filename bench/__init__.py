"""Rivals side by side with Luthier on the same work; results are committed under bench/results."""
