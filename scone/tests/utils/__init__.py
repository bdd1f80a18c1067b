"""Tests of scone.utils."""
