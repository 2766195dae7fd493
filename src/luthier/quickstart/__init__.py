"""Quickstart: the main job, small enough to see whole."""
