"""Every option, declared once with help, unit and bounds; argparse, YAML and Hydra are derived from it."""
