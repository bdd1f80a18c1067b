"""Tests of scone.models."""
