"""Tokenizers, counting, the f-gram vocabulary, the matcher."""
