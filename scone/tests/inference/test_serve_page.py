"""The page in a real browser: tokens with their f-grams, generating, hostile text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scone.inference.engine import GenerationOptions, SconeInferenceEngine
from scone.tests.inference.chromium import Browser
from scone.tests.inference.served import make_model, server

pytest.importorskip("fastapi", reason="the extra serve is not installed")

TEXT = "the cat sat on the mat"
HOSTILE = '<b>bold</b> & <script>document.title="owned"</script><img src=x onerror=document.title="owned">'
TOKENS = "[...document.querySelectorAll('#tokens .token')]"


def type_text(browser: Browser, text: str) -> None:
    browser.evaluate(f"(() => {{ const t = $('text'); t.value = {json.dumps(text)}; "
                     "t.dispatchEvent(new Event('input')); })()")  # fmt: skip
    browser.wait_for(f"{TOKENS}.map((one) => one.textContent).join('') === {json.dumps(text)}")


def test_the_page_shows_what_the_model_sees(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    engine = SconeInferenceEngine.from_pretrained(folder, folder / "embeddings.cache", device="cpu")
    with (
        server(folder) as (address, _),
        Browser(tmp_path / "profile") as browser,
    ):
        browser.open(f"{address}/")
        type_text(browser, TEXT)

        # tokens are coloured by the length of their match
        ids = engine.tokenizer(TEXT).input_ids
        vocabulary = engine.model.vocabulary
        nodes = engine.model.matcher.match(ids).tolist()
        lengths = [len(vocabulary.tokens(node)) for node in nodes]
        assert max(lengths) > 2
        classes = browser.evaluate(f"{TOKENS}.map((one) => one.className)")
        assert [f"length-{length}" in name for length, name in zip(lengths, classes, strict=True)] == [True] * len(ids)
        for scheme, color in {"light": "rgb(251, 227, 200)", "dark": "rgb(74, 53, 36)"}.items():
            browser.prefer(scheme)
            legend = "getComputedStyle(document.querySelector('#legend .length-2')).backgroundColor"
            assert browser.evaluate(legend) == color

        # pointing at one shows its f-gram, rank and count
        place = lengths.index(max(lengths))
        browser.point_at(f"{TOKENS}[{place}]")
        rank = nodes[place] - vocabulary.vocab_size
        browser.wait_for(f"$('f-gram').innerText.includes('rank {rank} · {vocabulary.counts[rank]} times')")
        assert browser.evaluate(f"{TOKENS}.filter((one) => one.classList.contains('part')).length") == lengths[place]

        # generating
        browser.evaluate("$('generate').click()")
        continued = "".join(engine.stream(TEXT, GenerationOptions(max_new_tokens=40)))
        browser.wait_for(f"$('written')?.textContent === {json.dumps(continued)} && !$('take').disabled")

        # text is text, whatever it looks like
        type_text(browser, HOSTILE)
        assert browser.evaluate("document.querySelectorAll('main img, main script, main b').length") == 0
        assert browser.evaluate("document.title") == "SCONE"
        assert browser.evaluate("$('error').hidden")
