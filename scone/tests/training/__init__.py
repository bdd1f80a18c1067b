"""Tests of scone.training."""
