"""Helpers that several packages need and no library provides."""
