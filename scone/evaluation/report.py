"""The demo's report: one self-contained HTML page made from report.json, in words that fit whoever won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from scone.evaluation.plots import Series, bar_chart, legend, line_chart
from scone.utils.text import human_bytes, human_count

PLAIN, SCONE = "var(--series-1)", "var(--series-2)"
Report = Mapping[str, Any]


def render_report(report: Report) -> str:
    """The whole page. ``report`` is what `scone.evaluation.demo` writes to report.json (docs/formats.md has its
    keys).
    """
    css = files("scone.evaluation").joinpath("report_style.css").read_text(encoding="utf-8")
    title = f"SCONE on {report['corpus']['name']}"
    sections = [
        _header(title, report),
        _verdict(report),
        _tiles(report),
        _quality(report),
        _f_grams(report),
        _cost(report),
        _samples(report),
        _method(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def verdict(report: Report) -> tuple[str, str, str]:
    """Who won: ("good" | "bad" | "even", headline, what it does and does not mean).

    Won means that the 95 % interval of the mean loss difference over held-out windows excludes zero. One seed: the
    interval covers the choice of text, not the luck of the initialisation.
    """
    plain, scone = (report["models"][key]["evaluation"]["perplexity"] for key in ("plain", "scone"))
    change = scone / plain - 1
    low, high = report["comparison"]["loss_difference_interval"]
    slower = report["models"]["scone"]["training_seconds"] / max(report["models"]["plain"]["training_seconds"], 1e-9)
    costs = (
        f"Both saw the same {human_count(report['training']['tokens'])} training tokens in the same order, with the "
        f"same trunk and schedule. SCONE takes {_flops_ratio(report):.2f}× the FLOPs a token at inference, and took "
        f"{slower:.2f}× as long to train. One run each of small models: a demonstration, not evidence for large ones."
    )
    numbers = f"perplexity {scone:.2f} against {plain:.2f} on held-out text"
    if high < 0:
        return "good", f"SCONE wins: {numbers} ({abs(change):.1%} lower)", costs
    if low > 0:
        return "bad", f"The plain model wins here: SCONE's {numbers} ({change:.1%} higher)", costs
    return "even", f"No clear difference here: {numbers} ({change:+.1%})", costs


def _flops_ratio(report: Report) -> float:
    plain, scone = (report["models"][key]["inference_flops_per_token"] for key in ("plain", "scone"))
    return float(scone / plain)


def _header(title: str, report: Report) -> str:
    machine = report["machine"]
    facts = [
        report["created"],
        f"SCONE {report['scone_version']}",
        f"{machine['processor']}, {machine['num_threads']} threads",
        f"PyTorch {machine['torch']}",
        f"{report['total_seconds'] / 60:.1f} minutes in all",
    ]
    return f"<header><h1>{escape(title)}</h1><div class='meta'>{escape(' · '.join(facts))}</div></header>"


def _verdict(report: Report) -> str:
    kind, headline, detail = verdict(report)
    return f"<div class='verdict {kind}'><strong>{escape(headline)}</strong><p>{escape(detail)}</p></div>"


def _tile(value: str, name: str, more: str = "") -> str:
    return (
        f"<div class='tile'><div class='value'>{escape(value)}</div><div class='name'>{escape(name)}</div>"
        f"<div class='more'>{escape(more)}</div></div>"
    )


def _tiles(report: Report) -> str:
    models, table = report["models"], report["table"]
    plain, scone = models["plain"], models["scone"]
    tiles = [
        _tile(
            f"{scone['evaluation']['perplexity'] / plain['evaluation']['perplexity'] - 1:+.1%}".replace("-", "−"),
            "perplexity, SCONE against plain",
            f"{plain['evaluation']['perplexity']:.2f} → {scone['evaluation']['perplexity']:.2f}",
        ),
        _tile(
            f"{_flops_ratio(report):.2f}×",
            "inference FLOPs per token",
            f"{human_count(scone['inference_flops_per_token'])}FLOP each",
        ),
        _tile(
            human_count(report["f_grams"]["num_f_grams"]),
            "f-grams, counted exactly",
            f"table {human_bytes(table['file_bytes'])}",
        ),
        _tile(
            f"{report['f_grams']['held_out_match_rate']:.0%}",
            "of held-out positions match one",
            f"up to {report['f_grams']['max_n']} tokens long",
        ),
    ]
    return f"<div class='tiles'>{''.join(tiles)}</div>"


def _figure(title: str, plot: str, caption: str, keys: Sequence[tuple[str, str, bool]] = ()) -> str:
    if not plot:
        return ""
    head = f"<h3>{escape(title)}</h3>{legend(keys) if keys else ''}"
    return f"<figure>{head}{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _quality(report: Report) -> str:
    models = report["models"]
    keys = [("plain", PLAIN, False), ("SCONE", SCONE, False)]
    colors = {"plain": PLAIN, "scone": SCONE}
    curves = [
        Series(f"{name}, validation", models[name]["validation_curve"], colors[name], markers=True) for name in colors
    ] + [Series(f"{name}, training", models[name]["training_curve"], colors[name], dashed=True) for name in colors]
    learning = line_chart(curves, "training tokens", "loss, nats per token", y_format=lambda value: f"{value:.2f}")
    bars = _loss_by_match_length(report, colors)
    return (
        "<h2>Quality at equal training tokens</h2><div class='plots'>"
        + _figure(
            "Learning curves",
            learning,
            "Solid: validation text. Dashed: training batches, smoothed by the logging interval.",
            keys,
        )
        + _figure(
            "Where the difference comes from",
            bars,
            "Loss of the next token after positions where the longest f-gram has this length. Both models are judged "
            "on the same positions.",
            keys,
        )
        + "</div>"
    )


def _loss_by_match_length(report: Report, colors: Mapping[str, str]) -> str:
    groups = {
        name: {group["length"]: group for group in report["models"][name]["evaluation"]["by_match_length"]}
        for name in colors
    }
    counts = {length: group["num_predicted"] for length, group in sorted(groups["plain"].items())}
    total = sum(counts.values())
    return bar_chart(
        [f"{'none' if length == 1 else length} ({count / total:.0%})" for length, count in counts.items()],
        [
            (
                label,
                colors[name],
                [groups[name][length]["loss"] if length in groups[name] else None for length in counts],
            )
            for name, label in (("plain", "plain"), ("scone", "SCONE"))
        ],
        "tokens of the longest f-gram at the position (share of positions)",
        "loss, nats per token",
        y_format=lambda value: f"{value:.2f}",
    )


def _f_grams(report: Report) -> str:
    f_grams = report["f_grams"]
    curve = line_chart(
        [Series("held-out positions matched", f_grams["match_rate_by_size"], SCONE, markers=True)],
        "number of f-grams S (most frequent first)",
        "positions matched",
        x_logarithmic=True,
        y_from_zero=True,
        y_format=lambda value: f"{value:.0%}",
    )
    rows = "".join(
        f"<tr><td><code>{escape(entry['text'])}</code></td><td>{entry['length']}</td><td>{entry['rank']:,}</td>"
        f"<td>{entry['count']:,}</td></tr>"
        for entry in f_grams["examples"]
    )
    table = (
        "<div class='scroll'><table><thead><tr><th>f-gram</th><th>tokens</th><th>rank</th><th>count</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
    return (
        f"<h2>The f-grams</h2><p>{f_grams['num_f_grams']:,} n-grams of 2 to {f_grams['max_n']} tokens that occur at "
        f"least {f_grams['min_count']} times in the training text, ranked by count. The longest that ends at a "
        "position gives that position its input embedding.</p><div class='plots'>"
        + _figure(
            "More f-grams match more of the text",
            curve,
            "Share of held-out positions at which some f-gram of the S most frequent ends.",
        )
        + f"<div>{table}</div></div>"
    )


def _row(name: str, cells: Sequence[str], winner: int | None = None) -> str:
    columns = "".join(
        f"<td{' class=winner' if index == winner else ''}>{escape(cell)}</td>" for index, cell in enumerate(cells)
    )
    return f"<tr><td>{escape(name)}</td>{columns}</tr>"


def _lower(values: Sequence[float]) -> int | None:
    """Index of the lowest of two values, None when they print alike."""
    return None if abs(values[0] - values[1]) < 1e-3 * abs(values[0]) else int(values[1] < values[0])


def _cost(report: Report) -> str:
    plain, scone = report["models"]["plain"], report["models"]["scone"]
    both = (plain, scone)

    def cells(key: str, form: Any) -> list[str]:
        return [form(model[key]) for model in both]

    evaluations = [model["evaluation"] for model in both]

    def quality(name: str, key: str, digits: int) -> str:
        values = [evaluation[key] for evaluation in evaluations]
        return _row(name, [f"{value:.{digits}f}" for value in values], _lower(values))

    rows = [
        quality("Held-out perplexity (lower is better)", "perplexity", 2),
        quality("Loss, nats per token", "loss", 4),
    ]
    if all(evaluation["bits_per_byte"] for evaluation in evaluations):
        rows.append(quality("Bits per byte of text", "bits_per_byte", 4))
    rows += [
        _row("Inference FLOPs per token", cells("inference_flops_per_token", lambda v: f"{human_count(v)}")),
        _row("Training FLOPs per token", cells("training_flops_per_token", lambda v: f"{human_count(v)}")),
        _row("Parameters resident at inference", cells("resident_parameters", human_count)),
        _row("Parameters trained", cells("trained_parameters", human_count)),
        _row("Model in memory at inference", cells("resident_bytes", human_bytes)),
        _row("Embedding table, off the accelerator", ["–", human_bytes(report["table"]["file_bytes"])]),
        _row(
            "Training time",
            cells("training_seconds", lambda v: f"{v:.0f} s"),
            _lower([m["training_seconds"] for m in both]),
        ),
        _row("Training speed", cells("training_tokens_per_second", lambda v: f"{human_count(v)} tokens/s")),
        _row("Evaluation speed", [f"{human_count(e['tokens_per_second'])} tokens/s" for e in evaluations]),
        _row("Generation, one sequence", cells("generation_tokens_per_second", lambda v: f"{v:.0f} tokens/s")),
    ]
    steps = "".join(
        f"<tr><td>{escape(step['name'])}<div class='more'>{escape(step['note'])}</div></td>"
        f"<td>{step['seconds']:.1f} s</td></tr>"
        for step in report["steps"]
    )
    return (
        "<h2>What it costs</h2><div class='columns'><div><div class='scroll'><table><thead><tr><th></th><th>plain</th>"
        f"<th>SCONE</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>{_loss_by_time(report)}</div>"
        "<div class='scroll'><table><thead><tr><th>Step of this run</th><th>Time</th></tr></thead>"
        f"<tbody>{steps}</tbody></table></div></div>"
    )


def _loss_by_time(report: Report) -> str:
    """Validation loss over training time at each model's mean speed: what equal tokens leave out."""
    series = [
        Series(
            label,
            [(tokens / model["training_tokens_per_second"], loss) for tokens, loss in model["validation_curve"]],
            color,
            markers=True,
        )
        for label, color, model in (
            ("plain", PLAIN, report["models"]["plain"]),
            ("SCONE", SCONE, report["models"]["scone"]),
        )
    ]
    return _figure(
        "Validation loss by training time",
        line_chart(series, "training time, seconds", "loss, nats per token", y_format=lambda value: f"{value:.2f}"),
        "The same runs over time, at each one's mean speed. The schedules end at different times: only the last points "
        "are finished models.",
        [("plain", PLAIN, False), ("SCONE", SCONE, False)],
    )


def _samples(report: Report) -> str:
    def continuation(prompt: str, text: str) -> str:
        rest = text[len(prompt) :] if text.startswith(prompt) else text
        return f"<pre><span class='given'>{escape(prompt)}</span>{escape(rest)}</pre>"

    blocks = [
        "<div class='samples'>"
        f"<div><h3>plain</h3>{continuation(sample['prompt'], sample['plain'])}</div>"
        f"<div><h3>SCONE</h3>{continuation(sample['prompt'], sample['scone'])}</div></div>"
        for sample in report["samples"]
    ]
    if not blocks:
        return ""
    return (
        "<h2>Generated text</h2><p>The openings of held-out documents (grey), continued by both models with the same "
        f"seed, temperature {report['sampling']['temperature']} and top-p {report['sampling']['top_p']}. SCONE reads "
        "its input embeddings from the table, for the generated tokens too. Models of this size imitate the surface of "
        "text; that is all to look for here.</p>" + "".join(blocks)
    )


def _method(report: Report) -> str:
    corpus, training, check = report["corpus"], report["training"], report["comparison"]
    low, high = check["loss_difference_interval"]
    facts = [
        f"Corpus: {corpus['description']}. {corpus['num_documents']:,} documents, split by document into "
        f"{corpus['tokens']['train']:,} training, {corpus['tokens']['validation']:,} validation and "
        f"{corpus['tokens']['test']:,} test tokens of {corpus['tokenizer']}.",
        f"Trunk: {training['trunk']}. {training['steps']:,} steps of {training['batch_size']} × "
        f"{training['max_length']} tokens, peak learning rate {training['learning_rate']:g}, {training['schedule']} "
        f"schedule, seed {training['seed']}.",
        f"SCONE: {training['input_embedding']}.",
        f"Difference of the mean loss (SCONE − plain) over {check['num_windows']} held-out windows: "
        f"{check['loss_difference']:+.4f} nats, 95 % interval {low:+.4f} to {high:+.4f} (paired over windows).",
        f"The table gives the live model's predictions: the largest difference of a window's loss is "
        f"{check['table_against_live']:.1e} nats.",
    ]
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f"<h2>How this was measured</h2><ul>{items}</ul><footer>Every number on this page is in "
        "<code>report.json</code> beside it and was measured by this run.</footer>"
    )
