"""Tests of scone.evaluation."""
