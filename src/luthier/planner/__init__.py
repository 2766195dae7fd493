"""The planner: bytes and seconds of a training before it starts, from shapes alone; no weights, no device."""
