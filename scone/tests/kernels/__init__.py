"""Tests of scone.kernels."""
