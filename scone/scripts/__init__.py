"""The documented entry points: parse arguments, call the library, print."""
