"""Tests of scone.data."""
