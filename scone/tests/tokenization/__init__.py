"""Tests of scone.tokenization."""
