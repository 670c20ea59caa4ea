import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from concept_ablation.common.image_store import (
    ROWS_A_GROUP,
    StoreError,
    open_store,
    read_store,
    write_store,
)

PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)) for i in range(3)]
ROWS = [
    {"image": PICTURES[0], "prompt": "a cat", "seed": 7, "index": 0, "role": "target", "subject": "cat"},
    {"image": PICTURES[1], "prompt": "an owl", "seed": 8, "index": 0, "role": "neighbor", "subject": "owl"},
    {"image": PICTURES[2], "prompt": "an owl", "seed": 9, "index": 1, "role": "neighbor", "subject": "owl"},
]


@pytest.fixture
def path(tmp_path):
    assert write_store(tmp_path / "s.parquet", iter(ROWS), {"stage": "test", "steps": 20}) == 3
    return tmp_path / "s.parquet"


def test_round_trip_is_lossless(path):
    store = read_store(path)
    assert store.metadata == {"stage": "test", "steps": 20}
    assert len(store) == 3
    assert store.column("seed") == [7, 8, 9]
    for position, (image, picture) in enumerate(zip(store.images(), PICTURES, strict=True)):
        assert np.array_equal(np.asarray(image), np.asarray(picture))
        assert store.png(position).startswith(b"\x89PNG")
    assert read_store(path).rows[1] == {name: value for name, value in ROWS[1].items() if name != "image"}


def test_select(path):
    store = read_store(path)
    owls = store.select(role="neighbor", subject="owl")
    assert owls.column("index") == [0, 1]
    assert np.array_equal(np.asarray(owls.image(1)), np.asarray(PICTURES[2]))
    assert len(store.select(role="anchor")) == 0


def test_anchor_rows_need_no_role(tmp_path):
    rows = [{name: row[name] for name in ("image", "prompt", "seed", "index")} for row in ROWS]
    write_store(tmp_path / "s.parquet", rows, {})
    assert read_store(tmp_path / "s.parquet").rows[0]["role"] is None


def test_more_rows_than_a_group(tmp_path):
    rows = ({**ROWS[0], "index": index} for index in range(130))
    assert write_store(tmp_path / "s.parquet", rows, {}) == 130
    assert read_store(tmp_path / "s.parquet").column("index") == list(range(130))


def test_an_open_store_gives_what_a_read_one_does_a_few_images_at_a_time(tmp_path, monkeypatch):
    path, count = tmp_path / "s.parquet", 3 * ROWS_A_GROUP + 1
    write_store(path, ({**ROWS[index % 3], "index": index} for index in range(count)), {"steps": 20})
    whole, opened = read_store(path), open_store(path)
    asked = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a: asked.append(a[1]) or original(*a))
    assert (opened.rows, opened.metadata, len(opened)) == (whole.rows, whole.metadata, count)
    assert opened.png(count - 1) == whole.png(count - 1) and asked == [3]
    owls, theirs = opened.select("neighbor", "owl"), whole.select("neighbor", "owl")
    assert owls.rows == theirs.rows and len(owls) == len(theirs)
    assert all(owls.png(index) == theirs.png(index) for index in range(len(owls)))
    assert asked == [3, 0, 1, 2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="damaged"):
        open_store(path)


def test_other_libraries_see_the_columns(path):
    schema = pq.read_schema(path)
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_nothing_is_left_of_a_store_that_failed(tmp_path):
    def rows():
        yield ROWS[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_store(tmp_path / "s.parquet", rows(), {})
    assert list(tmp_path.iterdir()) == []


def test_damaged_stores_are_named(path, tmp_path):
    with pytest.raises(StoreError, match="absent.parquet: there is no such image store"):
        read_store(tmp_path / "absent.parquet")
    content = path.read_bytes()
    for damaged in (b"", b"PAR1", content[: len(content) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="s.parquet: a damaged image store .*run again"):
            read_store(path)
    pq.write_table(pa.table({"prompt": ["a cat"]}), path)
    with pytest.raises(StoreError, match="no image store"):
        read_store(path)
    pq.write_table(pa.table({"prompt": ["a cat"]}).replace_schema_metadata({"concept_ablation": "{}"}), path)
    with pytest.raises(StoreError, match="no 'image' column|has no 'image'"):
        read_store(path)


def test_a_damaged_image_is_named(path):
    table = pq.read_table(path)
    struct = pa.array([{"bytes": b"\x89PNG broken", "path": "0.png"}] * 3, table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field("image"), struct), path)
    with pytest.raises(StoreError, match="image 0 is damaged"):
        read_store(path).image(0)
