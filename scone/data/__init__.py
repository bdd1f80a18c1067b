"""Text sources → documents → token files → training batches."""
