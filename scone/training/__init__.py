"""A training run: the trainer, its optimizer, its logging."""
