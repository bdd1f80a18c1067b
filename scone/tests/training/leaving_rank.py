"""A rank of a run that is over, as `python -m scone.scripts.train FLAGS …` leaves it: `leaving_rank.py FLAGS …`."""

from __future__ import annotations

import sys

import torch.distributed as dist

from scone.scripts.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
    assert not dist.is_initialized(), "gloo's threads may abort the process when it exits with a group"
