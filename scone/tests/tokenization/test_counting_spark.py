"""A cluster counts what one machine counts: Spark in local mode, with several slices, shuffles and tasks."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scone.tokenization.counting import CountResult, count_f_grams
from scone.utils.errors import SconeError

pyspark_sql = pytest.importorskip("pyspark.sql", reason="the cluster engine needs the extra [spark]")
from scone.tokenization.counting.spark import count_f_grams_on_spark  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Spark's own use of deprecated names and open sockets

REPOSITORY = Path(__file__).parents[3]
OPTIONS: dict = {"vocab_size": 300, "max_n": 4, "min_freq": 2, "separator_ids": [299]}


@pytest.fixture(scope="module")
def spark() -> Iterator:
    os.environ["PYSPARK_PYTHON"] = sys.executable
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), before]))
    builder = pyspark_sql.SparkSession.builder.master("local[2]").appName("test")
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.shuffle.partitions": "3",
        "spark.driver.memory": "512m",
        # for these seconds Java's second compiler and its collector's threads cost more than they save
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    }.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()
    # what it says as Python ends would go to a stream that is closed by then
    logging.getLogger("py4j").setLevel(logging.ERROR)


def skewed(length: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.minimum(generator.zipf(1.3, length) - 1, 299).astype(np.uint16)


def assert_equal(cluster: CountResult, local: CountResult) -> None:
    assert cluster.vocabulary.fingerprint == local.vocabulary.fingerprint
    assert cluster.vocabulary.counts.tolist() == local.vocabulary.counts.tolist()
    how = {"seconds": 0.0, "on_disk": False, "temporary_bytes": 0, "num_threads": 1}
    assert dataclasses.replace(cluster.statistics, **how) == dataclasses.replace(local.statistics, **how)


@pytest.mark.parametrize("ranking", ["gain", "frequency"])
def test_cluster_counts_equal_local_counts(spark, tmp_path, ranking):
    arrays = []
    for number, length in enumerate((2500, 1, 1200)):
        np.save(tmp_path / f"{number}.npy", skewed(length, number))
        arrays.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    limited = OPTIONS | {"max_f_grams": 150, "ranking": ranking}
    cluster = count_f_grams_on_spark(spark, token_arrays=arrays, slice_tokens=600, **limited)
    assert_equal(cluster, count_f_grams(arrays, quiet=True, **limited))


def test_mistakes_on_the_cluster_get_one_line(spark, tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([1, 2, 300], np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    with pytest.raises(SconeError, match="found token 300; expected tokens 0 … 299"):
        count_f_grams_on_spark(spark, token_arrays=[mapped], **OPTIONS)
    with pytest.raises(SconeError, match="not a whole memory-mapped file"):
        count_f_grams_on_spark(spark, token_arrays=[np.array([1, 2])], **OPTIONS)
