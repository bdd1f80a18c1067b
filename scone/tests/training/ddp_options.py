"""A rank that wraps its model as training does, and says how: `ddp_options.py FLAGS …`."""

from __future__ import annotations

import json
import sys
import warnings

from scone.scripts.train import read_arguments
from scone.training.distributed import destroy_process_group
from scone.training.run import build_model, build_trainer, prepare_run_corpus
from scone.utils.command_line import is_first_process

if __name__ == "__main__":
    options = read_arguments(sys.argv[1:])
    corpus = prepare_run_corpus(options, quiet=True)
    trainer = build_trainer(options, build_model(options, corpus, quiet=True), corpus, quiet=True)
    warnings.simplefilter("error", FutureWarning)
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    if is_first_process():
        names = ("gradient_as_bucket_view", "find_unused_parameters", "broadcast_buffers")
        print(json.dumps({name: getattr(wrapped, name) for name in names}))
    del trainer, wrapped
    destroy_process_group()
