"""Tests of scone.configs."""
