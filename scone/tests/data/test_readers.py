"""Reading one file: every format and compression, and one clear line for whatever is wrong with it."""

from __future__ import annotations

import gzip
import json
import lzma
from itertools import pairwise

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.data import readers
from scone.data.readers import cut_text, kind_of, read_documents, split_articles
from scone.utils.errors import SconeError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
ODD_TEXTS = ["plain", "line\u2028separator\u0085next line", "naïve 漢字 😀\n\n\x0c", "  two\r\nlines  "]


def write(path, content: bytes, compression: str = ""):
    path = path.with_name(path.name + compression)
    path.write_bytes(COMPRESS[compression](content))
    return path


def json_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(texts, tmp_path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), tmp_path / "made")
    return (tmp_path / "made").read_bytes()


@pytest.mark.parametrize("compression", COMPRESS)
def test_every_row_format_and_compression_gives_the_same_documents(tmp_path, compression):
    texts = ODD_TEXTS * 700  # more than a piece and a parquet batch
    rows = write(tmp_path / "rows.jsonl", json_lines(texts), compression)
    table = write(tmp_path / "table.parquet", parquet(texts, tmp_path), compression)
    for path in (rows, table):
        counts: list[int] = []
        assert list(read_documents(path, "text", counts.append)) == texts
        assert sum(counts) == pytest.approx(path.stat().st_size, rel=1e-3)  # the bytes of the file
    if compression:  # several frames in one file
        rows.write_bytes(2 * COMPRESS[compression](json_lines(["a"])))
        assert list(read_documents(rows, "text")) == ["a", "a"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_plain_text_is_cut_alike_in_every_compression(tmp_path, compression):
    text = "".join(f"{'word ' * (i % 90)}é\n{chr(10) * (i % 3)}" for i in range(3000))
    documents = list(read_documents(write(tmp_path / "a.txt", text.encode(), compression), ""))
    assert "".join(documents) == text
    assert documents == list(cut_text([text]))
    assert len(documents) > 10
    assert all(document.endswith("\n\n") for document in documents[:-1])


def test_a_python_file_is_one_document_and_a_byte_order_mark_no_text(tmp_path):
    text = "x = 1\n\n\n" * 10_000
    assert list(read_documents(write(tmp_path / "a.py", text.encode()), "")) == [text]
    assert list(read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"), "")) == ["hello"]
    assert list(read_documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}'), "text")) == ["hello"]


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("abcdefghijkl    \n\r\té😀"), min_size=30, max_size=400),
    st.lists(st.integers(0, 400), max_size=5),
)
def test_cutting_keeps_every_character_and_ignores_how_the_text_arrives(text, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_CHARACTERS", 8)
        patch.setattr(readers, "LINE_PIECE_CHARACTERS", 16)
        patch.setattr(readers, "LONGEST_PIECE_CHARACTERS", 40)
        bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
        pieces = [text[start:end] for start, end in pairwise(bounds)]
        documents = list(cut_text(pieces))
        assert documents == list(cut_text([text]))
        assert "".join(documents) == text
        assert all(0 < len(document) <= 40 for document in documents)
        for document in documents[:-1]:  # cut between words, where there are some
            assert document[-1].isspace() or not {" ", "\n"} & set(document[1:])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["\n", " \n", " = A = \n", " = B =\n", " = = C = = \n", " text = 1 \n", " = \n"])))
def test_articles_keep_every_line_and_start_at_titles(lines):
    articles = list(split_articles(lines))
    assert "".join(articles) == "".join(lines)
    for article in articles[1:]:
        assert article.split("\n")[0].strip() in ("= A =", "= B =")


def test_what_has_no_titles_is_cut_even_so(monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ARTICLE_CHARACTERS", 20)
    assert [len(article) for article in split_articles(["x" * 9 + "\n"] * 7)] == [30, 30, 10]


def test_articles_of_wikitext(tmp_path):
    text = (
        " \n = One = \n \n text \n = 1 not a title = \n more \n \n = = Part = = \n \n text \n \n = Two = \n \n end \n"
    )
    path = write(tmp_path / "wiki.tokens", text.encode())
    first, second = read_documents(path, "")
    assert "Part" in first
    assert "not a title" in first
    assert second == " = Two = \n \n end \n"


def test_articles_of_wikitext_2(shared_data):
    folder = shared_data / "wikitext-2"
    numbers = [
        sum(1 for _ in read_documents(folder / f"wiki.{name}.tokens", "")) for name in ("train", "valid", "test")
    ]
    assert numbers == [600, 60, 60]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet"])
def test_a_damaged_or_cut_off_file_is_refused(tmp_path, kind):
    texts, path = [f"text {i * i}" for i in range(20_000)], tmp_path / f"a{kind}"
    whole = parquet(texts, tmp_path) if kind == ".parquet" else COMPRESS[kind[6:]](json_lines(texts))
    junk = (b"PAR1",) if kind == ".parquet" else (whole + b"junk",)
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:3], b"", b"not compressed at all\n", *junk):
        path.write_bytes(content)
        with pytest.raises(SconeError, match=rf"a\{kind} is damaged"):
            list(read_documents(path, "text"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 \(.* at byte 25\)"),
        (b'[{"text": "a"}]\n', r"line 1 holds a JSON list; expected one JSON object a line"),
        (b'{"body": "a", "id": 1}\n', r"line 1 has no column 'text'; its columns are 'body', 'id'; choose one by"),
        (b'{"text": 5}\n', r"line 1: column 'text' holds int; expected text"),
        (None, r"cannot read .*a\.jsonl \(No such file"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SconeError, match=message) as caught:
        list(read_documents(path, "text"))
    assert "\n" not in str(caught.value)


def test_a_missing_parquet_column_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", parquet(["x"], tmp_path))
    for column, message in (("body", "no column 'body'; its columns are 'id', 'text'"), ("id", "'id' holds int")):
        with pytest.raises(SconeError, match=message):
            list(read_documents(path, column))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300_000), st.integers(0x80, 0xFF))
def test_text_that_is_not_utf_8_is_refused_where_it_is_not(tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("latin") / "a.txt"
    path.write_bytes(b"a" * position + bytes([byte]) + b"a" * 10)
    with pytest.raises(SconeError, match=rf"a\.txt is not UTF-8 \(.* at byte {position}\)"):
        list(read_documents(path, ""))


def test_half_a_surrogate_pair_becomes_a_character(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a\\ud800b"}\n{"text": null}\n{"text": "c"}')
    assert [text for text in read_documents(path, "text") if text] == ["a\ufffdb", "c"]


def test_kinds_follow_the_name(tmp_path):
    assert kind_of(tmp_path / "A.JSONL.ZST") == ("rows", ".zst")
    assert kind_of(tmp_path / "a.tokens") == ("articles", "")
    assert kind_of(tmp_path / "a.docx") is None
    assert kind_of(tmp_path / "a.gz") is None
