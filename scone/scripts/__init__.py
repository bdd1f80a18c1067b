"""The documented entry points: parse, build, call, print."""
