"""Tests of scone.scripts."""
