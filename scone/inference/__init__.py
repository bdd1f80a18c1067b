"""What serves a trained model: precompute, table format and stores, engine."""
