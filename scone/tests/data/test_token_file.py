"""Token files: what was written is what is read, and nothing else is opened."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.data.token_file import HEADER_BYTES, TokenFile, TokenFileWriter
from scone.utils.errors import SconeError


def write(folder, documents, vocab_size=1000, separator_id=0, fingerprint="f"):
    writer = TokenFileWriter(folder, vocab_size, separator_id)
    for document in documents:
        writer.add_document(document)
    return writer.finish({"tokenizer_fingerprint": fingerprint})


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 65_535), max_size=20), max_size=8),
    st.sampled_from([(65_536, "uint16"), (65_537, "uint32"), (1 << 20, "uint32")]),
)
def test_a_token_file_holds_every_document_and_its_separator(tmp_path_factory, documents, vocabulary):
    vocab_size, dtype = vocabulary
    folder = tmp_path_factory.mktemp("tokens")
    write(folder, documents, vocab_size)
    opened = TokenFile.open(folder)
    expected = [token for document in documents for token in [*document, 0]]
    assert opened.tokens.tolist() == expected
    assert np.load(folder / "tokens.npy", allow_pickle=False).tolist() == expected  # an ordinary .npy file
    assert (opened.tokens.dtype.name, opened.num_tokens, opened.num_documents) == (dtype, len(expected), len(documents))
    assert pickle.loads(pickle.dumps(opened)).tokens.tolist() == expected


def test_the_fingerprint_is_of_tokens_tokenizer_and_separator(tmp_path):
    ways = [{}, {}, {"documents": [[2, 1]]}, {"fingerprint": "g"}, {"separator_id": 3}]
    files = [write(tmp_path / str(at), **({"documents": [[1, 2]]} | way)) for at, way in enumerate(ways)]
    assert files[0].fingerprint == files[1].fingerprint
    assert len({file.fingerprint for file in files}) == 4


def test_content_of_a_large_file_is_checked_when_asked(tmp_path):
    write(tmp_path, [[1, 2, 3]])
    content = bytearray((tmp_path / "tokens.npy").read_bytes())
    content[HEADER_BYTES] ^= 1
    (tmp_path / "tokens.npy").write_bytes(content)
    with pytest.raises(SconeError, match="its checksum is another than the one noted"):
        TokenFile.open(tmp_path, check_content=False).verify()


def test_missing_files_and_other_versions_are_named(tmp_path):
    with pytest.raises(SconeError, match="found no token file in"):
        TokenFile.open(tmp_path / "gone")
    write(tmp_path, [[1]])
    (tmp_path / "tokens.npy").rename(tmp_path / "moved")
    with pytest.raises(SconeError, match=r"tokens\.npy is damaged: it cannot be read"):
        TokenFile.open(tmp_path)
    metadata = json.loads((tmp_path / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps(metadata | {"format_version": 2}))
    with pytest.raises(SconeError, match="has format version 2; expected 1"):
        TokenFile.open(tmp_path)


def test_a_writer_goes_on_from_what_was_synced(tmp_path):
    writer = TokenFileWriter(tmp_path, 100, 0)
    writer.add_document([1, 2])
    writer.sync()
    numbers = (writer.num_tokens, writer.num_documents)
    writer.add_document([3])  # not synced: lost
    writer.close()
    with pytest.raises(SconeError, match="found no token file"):
        TokenFile.open(tmp_path)
    for _ in range(2):  # also after it was finished, as if killed before its maker noted that
        writer = TokenFileWriter(tmp_path, 100, 0, *numbers)
        writer.add_document([4])
        assert writer.finish({"tokenizer_fingerprint": ""}).tokens.tolist() == [1, 2, 0, 4, 0]
    with pytest.raises(SconeError, match="is shorter than what was noted"):
        TokenFileWriter(tmp_path, 100, 0, 1000, 10)


def test_tokens_outside_the_vocabulary_are_a_programming_error(tmp_path):
    writer = TokenFileWriter(tmp_path, 100, 0)
    for token in (100, -1):
        with pytest.raises(ValueError):
            writer.add_document([token])
    writer.discard()
    assert not tmp_path.exists()
