"""The work: one loop for every method and objective, and what makes it safe to kill at any moment.

Blind by law: nothing here imports a method or an objective, or compares a name with one.
"""
