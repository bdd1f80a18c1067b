"""Change the row type of an embedding table: `scone table convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scone.configs.loading import parse_options
from scone.scripts.arguments import ROW_TYPES, arguments
from scone.utils.command_line import run_main
from scone.utils.errors import SconeError
from scone.utils.progress import is_quiet

CONVERT = arguments(
    "group_size",
    source={"positional": True, "metavar": "SOURCE", "help": "the table to read"},
    output={"positional": True, "metavar": "OUTPUT", "help": "the table to write"},
    row_type={"choices": ROW_TYPES, "help": "row type of the output (default: as the source)"},
)
EXAMPLES = ("scone table convert embeddings.cache embeddings.int4 --row_type int4 --group_size 32",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand. Raises SconeError for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: scone table convert SOURCE OUTPUT [options]\n\nexamples:")
        print("\n".join(f"  {example}" for example in EXAMPLES))
        return 0
    verb, *given = words
    if verb != "convert":
        raise SconeError(f"found scone table {verb}; expected scone table convert (see scone table --help)")
    description = "Change a table's row type; no model is needed."
    _, extra = parse_options(given, (), description, examples=EXAMPLES, add_arguments=CONVERT)
    from scone.inference.precompute import convert_table
    from scone.utils.text import human_bytes

    layout = convert_table(
        extra.source,
        extra.output,
        row_type=extra.row_type,
        group_size=extra.group_size,
        quiet=is_quiet(),
    )
    print(
        f"{extra.output}: {layout.num_rows:,} rows × {layout.row_format.width} {layout.row_format.row_type}, "
        f"{human_bytes(layout.file_bytes)} ({human_bytes(Path(extra.source).stat().st_size)} before)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
