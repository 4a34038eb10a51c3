from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradnoise.base.errors import InputError
from gradnoise.base.tables import EXPOSURE, FLOW, SCORES, label_of, read_table, write_table

LABEL = "REHEARSAL"
ROWS = {"block": ["race"], "cell": ["b016-lr0.002"], "stage": ["planned"], "runs": [5]}
MISSPELT = {name: values for name, values in ROWS.items() if name != "runs"}


def test_what_is_written_is_read_back_with_units(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", FLOW, ROWS, LABEL, {"source": "here"})
    table = read_table(tmp_path / "t.parquet", FLOW)
    assert table.to_pydict() == ROWS
    assert table.schema.field("runs").metadata[b"unit"] == b"runs"
    assert table.schema.metadata[b"source"] == b"here"
    assert label_of(table) == LABEL


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, FLOW, ROWS, LABEL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_measured_numbers_take_little_more_than_their_information(tmp_path: Path) -> None:
    """Numbers of one magnitude: 52 random bits each, and 12 that are nearly alike."""
    values = np.random.default_rng(0).uniform(1, 2, 20_000)
    rows = {column.name: [["x"], [1]][column.type != "text"] * len(values) for column in EXPOSURE.columns}
    write_table(tmp_path / "t.parquet", EXPOSURE, {**rows, "value": values}, LABEL)
    size = (tmp_path / "t.parquet").stat().st_size
    assert size < 1.06 * len(values) * 52 / 8, size


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="t.parquet: missing: rebuild it with snakemake, or .* dvc pull"):
        read_table(tmp_path / "t.parquet", FLOW)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", FLOW, ROWS, LABEL)
    content = (tmp_path / "t.parquet").read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "t.parquet").write_bytes(content[:length])
        with pytest.raises(InputError, match="t.parquet: is not a whole Parquet file"):
            read_table(tmp_path / "t.parquet", FLOW)


def test_one_flipped_bit_in_a_page_is_found(tmp_path: Path) -> None:
    rows = {name: values * 5000 for name, values in ROWS.items()} | {"runs": list(range(5000))}
    write_table(tmp_path / "t.parquet", FLOW, rows, LABEL)
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    where = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(3).data_page_offset
    content[where + 200] ^= 1
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole Parquet file"):
        read_table(tmp_path / "t.parquet", FLOW)


def test_other_columns_and_tables_without_a_label_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"block": ["race"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="expected table flow"):
        read_table(tmp_path / "t.parquet", FLOW)
    pq.write_table(pa.table(ROWS, schema=FLOW.schema()), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="t.parquet: carries no label of its study"):
        read_table(tmp_path / "t.parquet", FLOW)
    with pytest.raises(InputError, match=r"columns \['runs', 'runz'\]"):
        write_table(tmp_path / "u.parquet", FLOW, {**MISSPELT, "runz": [1]}, LABEL)
    with pytest.raises(InputError, match="mend the column of table flow"):
        write_table(tmp_path / "u.parquet", FLOW, {**ROWS, "runs": ["five"]}, LABEL)
    assert not (tmp_path / "u.parquet").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity")],
)
def test_nan_is_no_number(tmp_path: Path, value: float, message: str) -> None:
    row = {column.name: ["x"] if column.type == "text" else [1] for column in SCORES.columns}
    write_table(tmp_path / "good.parquet", SCORES, {**row, "value": [None]}, LABEL)
    with pytest.raises(InputError, match=f"value: {message}: write null"):
        write_table(tmp_path / "bad.parquet", SCORES, {**row, "value": [value]}, LABEL)
    with pytest.raises(InputError, match="sum_lr: null: every row needs a value"):
        write_table(tmp_path / "bad.parquet", SCORES, {**row, "sum_lr": [None]}, LABEL)
    assert not (tmp_path / "bad.parquet").exists()
