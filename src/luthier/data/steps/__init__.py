"""One file = one data step; the name in the recipe is the name of the file (contracts/step.py says what a step is)."""
