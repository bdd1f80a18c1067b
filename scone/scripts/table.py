"""Look at an embedding table, or change its row type or length: `scone table info|convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scone.configs.loading import parse_options
from scone.scripts.arguments import ROW_TYPES, arguments
from scone.utils.command_line import did_you_mean, run_main
from scone.utils.errors import SconeError
from scone.utils.progress import is_quiet

INFO = arguments("json", path={"positional": True, "metavar": "PATH", "help": "the table"})
CONVERT = arguments(
    "group_size",
    source={"positional": True, "metavar": "SOURCE", "help": "the table to read"},
    output={"positional": True, "metavar": "OUTPUT", "help": "the table to write"},
    row_type={"choices": ROW_TYPES, "help": "row type of the output (default: as the source)"},
    num_rows={"type": int, "help": "keep only the first rows, those of the most frequent f-grams"},
)
EXAMPLES = (
    "scone table info outputs/scone-model/embeddings.cache",
    "scone table convert embeddings.cache embeddings.int4 --row_type int4 --group_size 32",
    "scone table convert embeddings.cache head.cache --num_rows 100000",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand. Raises SconeError for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: scone table info PATH | scone table convert SOURCE OUTPUT [options]\n\nexamples:")
        print("\n".join(f"  {example}" for example in EXAMPLES))
        return 0
    verb, *arguments = words
    if verb not in _VERBS:
        advice = did_you_mean(verb, _VERBS) or f"expected {' or '.join(_VERBS)}"
        raise SconeError(f"found scone table {verb}; {advice} (see scone table --help)")
    _VERBS[verb](arguments)
    return 0


def _info(argv: Sequence[str]) -> None:
    """Print the header; rows are not read."""
    description = "Show what an embedding table holds and what it was made from."
    _, extra = parse_options(argv, (), description, examples=EXAMPLES, add_arguments=INFO, config_flag=False)
    from scone.inference.table_format import TableFile
    from scone.utils.text import human_bytes

    with TableFile(extra.path) as file:
        layout, start = file.layout, file.data_start
    if extra.json:
        facts = {"row_type": layout.row_format.row_type, "width": layout.row_format.width, "num_rows": layout.num_rows}
        facts |= {"row_bytes": layout.row_bytes, "group_size": layout.row_format.group_size}
        facts |= {"file_bytes": layout.file_bytes, "data_start": start, "compute_dtype": layout.compute_dtype}
        print(json.dumps(facts | {"fingerprints": dict(layout.fingerprints)}, indent=2))
        return
    row = layout.row_format
    grouping = f", groups of {row.group_size}" if row.group_size else ""
    lines = {
        "rows": f"{layout.num_rows:,} × {row.width}",
        "row type": f"{row.row_type}{grouping}, {layout.row_bytes:,} bytes a row, computed in {layout.compute_dtype}",
        "size": f"{human_bytes(layout.file_bytes)} (rows {human_bytes(layout.payload_bytes)}, from byte {start:,})",
        **{name: fingerprint or "unknown" for name, fingerprint in layout.fingerprints.items()},
    }
    print("\n".join(f"{name:<11} {value}" for name, value in lines.items()))


def _convert(argv: Sequence[str]) -> None:
    """Write the converted table and print its path."""
    description = "Change a table's row type or cut it to its first rows; no model is needed."
    _, extra = parse_options(argv, (), description, examples=EXAMPLES, add_arguments=CONVERT, config_flag=False)
    from scone.inference.table_tools import convert_table
    from scone.utils.text import human_bytes

    layout = convert_table(
        extra.source,
        extra.output,
        row_type=extra.row_type,
        group_size=extra.group_size,
        num_rows=extra.num_rows,
        quiet=is_quiet(),
    )
    print(
        f"{extra.output}: {layout.num_rows:,} rows × {layout.row_format.width} {layout.row_format.row_type}, "
        f"{human_bytes(layout.file_bytes)} ({human_bytes(Path(extra.source).stat().st_size)} before)"
    )


_VERBS: dict[str, Callable[[Sequence[str]], None]] = {"info": _info, "convert": _convert}


if __name__ == "__main__":
    sys.exit(run_main(main))
