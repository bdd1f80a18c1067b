"""The report of a comparison: every file is written, every number is in them, what nobody measured is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scone.evaluation.report import RunResult, markdown, write_report
from scone.tests.evaluation.test_demo import check_page
from scone.utils.environment import environment


def result(
    name: str, perplexity: float, s: int | None = None, size: int | None = None, flops: float = 1e6
) -> RunResult:
    """All that one model can have; with ``s`` f-grams and an f-gram model of ``size`` weights, or plain."""
    latencies = {f"{name}_seconds_p{p}": 0.01 * p for name in ("prefill", "first_token", "decode_step")
                 for p in (50, 90, 99)}  # fmt: skip
    rates = {"prefill_tokens_per_second": 9000.0, "decode_tokens_per_second": 120.0}
    return RunResult(
        name,
        "f-gram model" if s else "plain",
        {"Wiki & Text": {"perplexity": perplexity, "perplexity_interval": [perplexity - 1, perplexity + 1]}},
        num_f_grams=s,
        f_gram_model_parameters=size,
        parameters={"resident": 1000, "training_only": size or 0, "table": (s or 0) * 8},
        inference_flops_per_token=flops,
        training_flops_per_token=3 * flops,
        resident_bytes=4000,
        table_bytes=s and 32 * s,
        table_memory_bytes=s and 32 * s,
        peak_process_bytes=10**9,
        speed=[{"batch_size": n, "sequence_length": 64} | rates | latencies for n in (1, 4)],
    )


@pytest.fixture
def results() -> list[RunResult]:
    ours = result("<small> 1k", 31.0, 1000, 500), result("small 9k", 30.0, 9000, 500), result("large", 29.5, 1000, 5000)
    return [*ours, result("plain", 33.0), result("plain, doubled", 29.8, flops=2e6)]


def test_report_writes_every_form(results: list[RunResult], tmp_path: Path) -> None:
    missing = [{"what": "SCONE-Large", "why": "found no folder <x>"}]
    facts = {"machine": environment(), "notes": ["As <is>."]}
    written = write_report(results, tmp_path / "report", title="A & B", facts=facts, missing=missing)
    assert sorted(path.name for path in written) == ["benchmark.html", "benchmark.json", "benchmark.md"]
    record = json.loads((tmp_path / "report" / "benchmark.json").read_text())
    assert [RunResult(**entry) for entry in record["records"]] == results
    assert record["missing"] == missing
    page = (tmp_path / "report" / "benchmark.html").read_text(encoding="utf-8")
    check_page(page)
    assert page.count("<svg") == 3, "FLOPs of inference and training, S"
    for text in ("&lt;small&gt; 1k", "Wiki &amp; Text", "SCONE-Large", "As &lt;is&gt;.", "31.00 (30.00–32.00)"):
        assert text in page
    assert page.count("A &amp; B") == 2, "in the head and above the page"
    assert "<small>" not in page
    text = (tmp_path / "report" / "benchmark.md").read_text(encoding="utf-8")
    assert "| plain, doubled | plain | 29.80 (28.80–30.80) |" in text
    assert "2 M (2.00×)" in text
    assert "- SCONE-Large: found no folder <x>" in text


def test_costs_are_compared_with_the_first_plain_model_and_a_live_model_says_so(results: list[RunResult]) -> None:
    results[0].facts["served"], results[1].facts["served"] = "live", "table"
    text = markdown([results[0], results[1], results[4]], "t")
    assert "1 M (0.50×)" in text
    assert text.count("f-gram model, live") == 1


def test_what_nobody_measured_is_left_out(tmp_path: Path) -> None:
    """Another command may know perplexities alone; and a model may have none at all."""
    few = [RunResult(name, name, {"x": {"perplexity": value}}) for name, value in (("a", 3.0), ("b", float("inf")))]
    write_report([*few, RunResult("c", "rows")], tmp_path)
    page = (tmp_path / "benchmark.html").read_text(encoding="utf-8")
    assert "<svg" not in page
    for heading in ("Memory", "Speed", "Parameters", "Missing"):
        assert heading not in page
    assert "## Memory" not in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
