"""The hot loops. Their reference implementations are in ``scone/tests/kernels/reference.py``."""
