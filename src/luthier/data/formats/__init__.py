"""One shape of rows per file: NAME, COLUMNS (for people), `detect(row)` by columns, `read(row, source) -> Record`.

A new file here is a new format: `data/detect.py` finds it by listing this folder. `RANK` orders the question "is it
you?" where rows carry the columns of two shapes; the lower asks first.
"""
