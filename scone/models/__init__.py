"""The f-gram model, the input embedding layers, the language model, and their accounting."""
