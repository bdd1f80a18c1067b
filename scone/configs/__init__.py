"""Every option once, with help, unit and bounds; argparse, YAML and Hydra are views of it."""
