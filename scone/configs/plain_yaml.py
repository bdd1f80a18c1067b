"""YAML that anybody may have written: plain values only, and no few lines that stand for a million."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from scone.utils.command_line import one_line
from scone.utils.errors import SconeError

if TYPE_CHECKING:
    import yaml

LARGEST_FILE_BYTES = 1 << 20
MOST_VALUES = 10_000
DEEPEST = 50
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # all raised by PyYAML for its input


def load_plain_yaml(path: str | Path) -> Any:
    """What a YAML file says. Raises SconeError: missing, damaged, too large, too deep, tags that would be objects.

    Aliases (``*name``) and merge keys work, but each counts as all that it stands for: at most 10,000 values.
    """
    import yaml

    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise SconeError(f"found {path} of {path.stat().st_size:,} bytes; expected a short file of options")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _num_values(node, {}, 1) > MOST_VALUES:
                raise SconeError(f"{path}: found more than {MOST_VALUES:,} values; expected a short file of options")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise SconeError(f"found no file {path}; expected a YAML file of options; check --config") from None
    except (OSError, ArithmeticError, *_MALFORMED, yaml.YAMLError) as error:
        reason = one_line(str(error))[:300] or type(error).__name__
        raise SconeError(f"cannot read {path} as YAML: {reason}; mend the file") from error


def _num_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values ``node`` stands for with all aliases written out; raises ValueError for one that never ends."""
    import yaml

    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias stands for what it is part of")
        return known[id(node)]
    if depth > DEEPEST:
        raise ValueError(f"values more than {DEEPEST} levels deep")
    known[id(node)] = 0
    pairs = isinstance(node, yaml.MappingNode)
    parts = [part for pair in node.value for part in pair] if pairs else node.value
    known[id(node)] = 1 + sum(_num_values(part, known, depth + 1) for part in parts)
    return known[id(node)]
