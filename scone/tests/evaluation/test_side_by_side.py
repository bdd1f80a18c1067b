"""Programs at the same time, as experiments and benchmarks run them: what a failed one said, and which GPU it saw."""

from __future__ import annotations

import sys

from scone.tests.evaluation.experiments import module


def test_the_last_words_of_a_program(tmp_path, monkeypatch):
    """An error wins over what follows it, torchrun's summary too; then comes a signal, then the last line."""
    programs = {
        "import sys; print('[rank1]: ValueError: no'); print('bye'); sys.exit(1)": "[rank1]: ValueError: no",
        "raise SystemExit('error: found a fly in the soup')": "error: found a fly in the soup",
        "print('torch.distributed.elastic.ChildFailedError: x'); import os; os.kill(os.getpid(), 9)": (
            "Signal 9 ended it"
        ),
        "print('hello')": "hello",
        "": "no output",
        "import time; time.sleep(60)": "TimeoutError: not through after 4 s",
    }
    side_by_side = module("side_by_side")
    started = [
        side_by_side.Program([sys.executable, "-c", program], tmp_path / f"{place}.log", {})
        for place, program in enumerate(programs)
    ]
    side_by_side.run_side_by_side(started, timeout_seconds=4)
    assert [side_by_side.last_words(program.log.read_text()) for program in started] == list(programs.values())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert side_by_side.gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")  # each sees one of the GPUs that we were given
    assert side_by_side.gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "7"}
