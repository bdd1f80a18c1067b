"""Perplexity, benchmark, report."""
