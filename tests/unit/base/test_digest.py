"""Equal content has one digest; any other content has another."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradnoise.base.digest import table_digest
from gradnoise.base.errors import InputError

ROWS = {"run": ["a", "b", "b"], "step": [1, 2, 2], "value": [0.1, None, 0.3], "on": [True, False, None]}
TABLE = pa.table(ROWS)
# Written down once: a later version of pyarrow must find it again.
DIGEST = "998e3c44cdda772435421e7d03753da9d2317ed9d3699d02cf7d2c80c9f9e96c"


def changed(**columns: object) -> pa.Table:
    return pa.table(ROWS | columns)


SAME = {
    "rows in another order": TABLE.take([2, 0, 1]),
    "columns in another order": TABLE.select(["value", "on", "run", "step"]),
    "dictionary of texts": changed(run=pa.array(ROWS["run"]).dictionary_encode()),
    "large texts": changed(run=pa.array(ROWS["run"], pa.large_string())),
    "chunks": pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)]),
    "other metadata": TABLE.replace_schema_metadata({"label": "REHEARSAL"}),
}
OTHER = {
    "last bit of a float": changed(value=[0.1 + 2**-56, None, 0.3]),
    "zero": changed(value=[0.0, None, 0.3]),
    "the other zero": changed(value=[-0.0, None, 0.3]),
    "null for a number": changed(value=[None, None, 0.3]),
    "NaN for a null": changed(value=pa.array([0.1, float("nan"), 0.3], from_pandas=False)),
    "row dropped": TABLE.slice(0, 2),
    "row twice": TABLE.take([0, 1, 2, 2]),
    "another row twice": TABLE.take([0, 0, 1, 2]),
    "two values of a column swapped": changed(step=[2, 1, 2]),
    "column renamed": TABLE.rename_columns(["name", "step", "value", "on"]),
    "narrower numbers": changed(step=pa.array([1, 2, 2], pa.int32())),
    "number as text": changed(step=["1", "2", "2"]),
    "texts moved over a boundary": changed(run=["ab", "", "b"]),
    "no rows": TABLE.slice(0, 0),
}


def test_the_digest_is_the_one_of_earlier_versions() -> None:
    assert table_digest(TABLE) == DIGEST


@pytest.mark.parametrize("change", SAME)
def test_equal_content_has_the_same_digest(change: str) -> None:
    assert table_digest(SAME[change]) == DIGEST


def test_other_content_has_another_digest() -> None:
    digests = {name: table_digest(table) for name, table in OTHER.items()} | {"as it was": DIGEST}
    assert len(set(digests.values())) == len(digests), digests


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(TABLE, path, row_group_size=1, compression="gzip", write_page_checksum=True)
    assert table_digest(path) == DIGEST
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="is not a whole Parquet file"):
        table_digest(path)
    with pytest.raises(InputError, match="none\\.parquet: missing"):
        table_digest(tmp_path / "none.parquet")


def test_a_column_that_has_no_one_spelling_is_refused() -> None:
    with pytest.raises(InputError, match=r"at: timestamp.*must be text"):
        table_digest(pa.table({"at": pa.array([0], pa.timestamp("s"))}))
