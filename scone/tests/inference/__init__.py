"""Tests of scone.inference."""
