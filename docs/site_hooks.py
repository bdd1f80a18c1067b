"""What the site is built with beside its pages: the reference, made from the code, and links that leave the pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from reference import pages  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the reference and the list of decisions."""
    from mkdocs.structure.files import File

    for name, text in {**pages(), "decisions/index.md": list_of_decisions()}.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A link to a source file is a link in the repository; on the site it is the file's name."""

    def plain(match: re.Match[str]) -> str:
        target = (DOCS / page.file.src_uri).parent / match["target"]
        inside = target.resolve().is_relative_to(DOCS.resolve())
        is_page = inside and target.suffix == ".md"
        return match[0] if is_page or match["target"].startswith("/") or not target.exists() else match["text"]

    return _LINK.sub(plain, markdown)


def list_of_decisions() -> str:
    """A page of all decision records: their titles, and the line that states each decision."""
    lines = ["# Decisions", "", "Why things are as they are, one short record each.", ""]
    for path in sorted((DOCS / "decisions").glob("*.md")):
        title, _, stated, *_ = path.read_text(encoding="utf-8").splitlines()
        lines.append(f"* [{title.lstrip('# ')}]({path.name}). {stated.partition('.* ')[2]}")
    return "\n".join(lines) + "\n"
