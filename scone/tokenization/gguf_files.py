"""How transformers' ``from_pretrained`` is told what a name means: a folder, a GGUF file, or a model of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from scone.utils.errors import SconeError
from scone.utils.hub import within_reach


def load_arguments(name: str | Path, expected: str = "a model folder such as OUTPUT_DIR/final_model") -> dict[str, Any]:
    """The arguments that name a model, or a tokenizer, to ``from_pretrained``: for a GGUF file, or a folder that holds
    one and no other model, its folder and ``gguf_file``; for all else the name as `within_reach` gives it
    (``expected``: for its refusal).

    Raises SconeError: several files to choose from, no such file or folder, a name that is neither here nor in reach of
    the hub, the extra ``gguf`` is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:5])
            raise SconeError(f"found {len(files)} GGUF files in {path} ({names}); expected one; give the file's path")
        path = files[0] if files else path
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return {"pretrained_model_name_or_path": within_reach(name, expected)}
    if not path.is_file():
        raise SconeError(f"found no file {path}; expected a GGUF file there; check the path")
    if find_spec("gguf") is None:
        raise SconeError(
            f"found the GGUF file {path} and no library that reads it; install it: pip install 'scone-lm[gguf]'"
        )
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def unpacked(where: Mapping[str, Any]) -> dict[str, Any]:
    """What has ``from_pretrained`` turn the weights of a GGUF file into ordinary ones, whatever else it could do:
    transformers 5.23 keeps them packed where the library ``kernels`` is there, and such weights cannot be trained.
    """
    config = getattr(transformers, "GgufConfig", None) if "gguf_file" in where else None
    return {} if config is None else {"quantization_config": config(dequantize=True)}
