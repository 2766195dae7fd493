"""Use: what a tuned model is worth, measured. `luthier.evaluate` is the function; this is the room."""
