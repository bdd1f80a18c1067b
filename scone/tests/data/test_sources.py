"""What a dataset name resolves to, which splits it gives, and the one line where it gives nothing."""

from __future__ import annotations

import json
from itertools import chain

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from scone.data.sources import hub_units, open_documents, open_source, plan, stdlib_files
from scone.utils.errors import SconeError


def corpus(folder, **files: str):
    """A folder of jsonl files: name → comma-separated texts."""
    folder.mkdir(exist_ok=True)
    for name, texts in files.items():
        rows = [json.dumps({"text": text}) + "\n" for text in texts.split(",")]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return str(folder)


def splits_of(name: str) -> dict[str, list[str]]:
    return {
        split: list(open_documents(name, None, split))
        for group in plan(open_source(name), None)
        for split in group.splits
    }


def everything(found):
    return sorted(chain.from_iterable(found.values()))


FOLDERS = [
    # files → documents of the splits; None: divided by content
    ({"train": "1,2,3", "valid": "4,5", "test": "6"}, {"train": "123", "validation": "45", "test": "6"}),
    ({"train": "1,2,3", "validation": "4"}, {"train": "123", "validation": "4"}),
    # a missing validation split comes from train
    ({"train": "1,2,3,4,5", "test": "6,7"}, {"train": None, "validation": None, "test": "67"}),
    # names say nothing where one file names no split
    ({"test": "1,2", "main": "3,4,5"}, {"train": None, "validation": None, "test": None}),
]


@pytest.mark.parametrize(("files", "expected"), FOLDERS, ids=lambda each: ",".join(each))
def test_files_that_name_splits_are_the_splits(tmp_path, files, expected):
    name = corpus(tmp_path / "a", **files)
    found = splits_of(name)
    assert list(found) == list(expected)
    assert {split: "".join(found[split]) for split, texts in expected.items() if texts} == {
        split: texts for split, texts in expected.items() if texts
    }
    assert everything(found) == sorted(open_documents(name, None, "all"))
    assert all(len(found[split]) == 1 for split, texts in expected.items() if texts is None and split != "train")


def test_training_text_comes_from_no_other_split(tmp_path):
    """And a test split from nowhere; a file alone is read as a whole."""
    name = corpus(tmp_path / "a", train="1,2,3", validation="4")
    with pytest.raises(SconeError, match="has no 'test' split; it has train, validation; choose one of these or 'all'"):
        list(open_documents(name, None, "test"))
    name = corpus(tmp_path / "b", validation="1", test="2")
    with pytest.raises(SconeError, match="has no 'train' split; it has validation, test"):
        list(open_documents(name, None, "train"))
    assert list(open_documents(str(tmp_path / "b" / "test.jsonl"), None, "test")) == ["2"]


@pytest.mark.parametrize("file_name", ["corpus", "train"])
def test_a_source_of_one_split_is_divided_by_content(tmp_path, file_name):
    texts = [f"text {number}" for number in range(200)] * 2
    corpus(tmp_path / "a", **{file_name: ",".join(texts)})
    for name in (tmp_path / "a", tmp_path / "a" / f"{file_name}.jsonl"):
        found = splits_of(str(name))
        assert everything(found) == sorted(texts)
        assert not set(found["train"]) & {*found["validation"], *found["test"]}
        assert len(found["validation"]) >= 2


def test_folders_are_read_in_order_without_hidden_files_read_mes_and_licences(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "README.md", "LICENSE.txt", ".hidden/x.txt", ".y.txt", "c.bin", "b/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert list(open_documents(str(tmp_path), None, "all")) == ["a/1.txt", "b/2.txt", "b/notes.md"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found no files in"),
        ({"a.docx": b"x", "b.pdf.gz": b"x"}, r"found \.docx, \.pdf\.gz in .*; expected \.txt"),
        ({"a.txt": b""}, "gives no document to its 'train' split"),
        ({"a.txt": b" \n\n "}, "gives no document to its 'train' split"),
        ({"a.jsonl": b"\n"}, "gives no document to its 'train' split"),
    ],
)
def test_a_corpus_without_text_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SconeError, match=message):
        list(open_documents(str(tmp_path), None, "train"))


@pytest.mark.parametrize("name", ["./gone", "/gone/corpus", "~/gone", "gone.jsonl", "gone.txt.gz", "a/b/c", "unknown"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub_and_a_name_is_refused_in_one_line(name):
    with pytest.raises(
        SconeError, match="dataset 'unknown'.*local" if name == "unknown" else "found no file"
    ) as caught:
        open_source(name, "some-config" if name == "unknown" else None)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_datasets_library_is_streamed_by_its_splits(tmp_path):
    name = corpus(tmp_path / "a", train="1,2,3", test="4")
    units = hub_units(name, None, "text")
    assert {unit.split: list(unit.read(lambda n: None)) for unit in units} == {"train": ["1", "2", "3"], "test": ["4"]}
    with pytest.raises(SconeError, match="no column 'body'"):
        list(hub_units(name, None, "body")[0].read(lambda n: None))
    with pytest.raises(SconeError, match=r"cannot open dataset .*\(configuration 'nope'\)"):
        hub_units(name, "nope", "text")


def test_rows_of_a_wikitext_data_set_are_joined_to_articles(tmp_path):
    lines = ["", " = One = \n", "", " text \n", "", " = Two = \n", "", " more \n"]
    (unit,) = hub_units(corpus(tmp_path / "wikitext", train=",".join(lines)), None, "text")
    assert list(unit.read(lambda n: None)) == ["\n = One = \n\n text \n\n", " = Two = \n\n more \n"]


def test_the_standard_library_is_a_corpus():
    source = open_source("python-stdlib")
    (unit,) = source.units
    assert unit.facts == open_source("python-stdlib").units[0].facts
    documents = list(open_documents("python-stdlib", None, "all"))
    assert len(documents) > 300
    assert sum(map(len, documents)) > 5_000_000
    assert any("class OrderedDict" in text for text in documents)
    assert not any("site-packages" in str(path) for path in stdlib_files())


def hub_folder(folder, files, card="license: mit", **others: str):
    """A dataset as it comes from the hub: parquet files (path → comma-separated texts), README, other files."""
    for path, texts in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts.split(",")}), folder / path)
    (folder / "README.md").write_text(f"---\n{card}\n---\n# A dataset\n", encoding="utf-8")
    for name, content in others.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return str(folder)


FEATURES = {"text": {"dtype": "string", "_type": "Value"}}
INFOS = json.dumps(
    {"default": {"features": FEATURES, "splits": {name: {"name": name} for name in ("train", "validation", "test")}}}
)


def test_a_folder_of_the_hub_is_its_data_and_not_what_describes_it(tmp_path):
    """Neither its metadata nor the program that once read it is text."""
    files = {"data/train-00000-of-00002.parquet": "1,2", "data/train-00001-of-00002.parquet": "3"}
    files |= {"data/validation-00000-of-00001.parquet": "4", "data/test-00000-of-00001.parquet": "5"}
    name = hub_folder(tmp_path, files, dataset_infos__json=INFOS, builder__py="import os")
    assert splits_of(name) == {"train": ["1", "2", "3"], "validation": ["4"], "test": ["5"]}


def test_splits_of_other_names_are_left_out_as_from_the_hub(tmp_path):
    texts = {"train": "train,other", "test": "test", "unsupervised": "unsupervised"}
    files = {f"data/{split}-00000-of-00001.parquet": texts[split] for split in texts}
    name = hub_folder(tmp_path / "a", files)
    assert set(chain.from_iterable(splits_of(name).values())) == {"train", "other", "test"}
    assert list(open_documents(name, None, "test")) == ["test"]
    alone = hub_folder(tmp_path / "b", {"data/unsupervised-00000-of-00001.parquet": "1,2,3"})
    assert sorted(chain.from_iterable(splits_of(alone).values())) == ["1", "2", "3"]


CONFIGURATIONS = """configs:
- config_name: a
  data_files:
  - {split: train, path: first/x-*}
  - {split: test, path: first/y-*}
- config_name: b
  data_files: second/*"""


def test_configurations_of_a_readme_are_those_of_the_folder(tmp_path):
    files = {"first/x-0.parquet": "1,2", "first/y-0.parquet": "3", "second/z.parquet": "4"}
    name = hub_folder(tmp_path, files, CONFIGURATIONS)
    assert list(open_documents(name, "a", "test")) == ["3"]
    assert list(open_documents(name, "a", "all")) == ["1", "2", "3"]
    assert list(open_documents(name, "b", "all")) == ["4"]
    with pytest.raises(SconeError, match=r"Please pick one among the available configs: \['a', 'b'\]"):
        open_source(name)
    facts = open_source(name, "b").units[0].facts
    assert facts != open_source(name, "a").units[0].facts
    pyarrow.parquet.write_table(pyarrow.table({"text": ["changed"]}), tmp_path / "second/z.parquet")
    assert facts != open_source(name, "b").units[0].facts


def test_a_configuration_may_be_a_folder(tmp_path):
    name = hub_folder(tmp_path, {"en/train.parquet": "1", "de/train.parquet": "2"})
    assert list(open_documents(name, "de", "all")) == ["2"]
    assert sorted(open_documents(name, None, "all")) == ["1", "2"]


def test_what_the_datasets_library_saved_for_itself_is_refused_by_name(tmp_path):
    """Its metadata is JSON, and would be read as text."""
    data = datasets.Dataset.from_dict({"text": ["some text"] * 3})
    for name, saved in {"a": data, "b": datasets.DatasetDict({"train": data})}.items():
        saved.save_to_disk(tmp_path / name)
        with pytest.raises(SconeError, match="saved by save_to_disk; expected files of text, JSON lines or parquet"):
            open_source(str(tmp_path / name))
