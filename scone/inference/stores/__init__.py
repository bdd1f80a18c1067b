"""Where a table's rows are kept: one contract (`base.py`), one file for each implementation."""
