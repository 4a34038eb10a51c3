"""What a table says, whatever its bytes: one digest for equal content."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json


def table_digest(source: pa.Table | Path | str) -> str:
    """SHA-256 (hex) of a table's content: the names and types of its columns, and the multiset of its rows.

    The columns are sorted by name, every row is the canonical JSON of its values with floats in hexadecimal,
    and the rows are counted in no order. So rows in another order, other row groups, another compression,
    dictionaries or another version of pyarrow give the same digest; another value, name or type gives
    another, and so does a missing or repeated row. Metadata do not count. `source`: a table, or a Parquet
    file, whose page checksums are verified.

    Raises `InputError` for a file that is missing or no whole Parquet file, and for a column that is
    neither text nor a whole number, a floating-point number or a truth value.
    """
    table = source if isinstance(source, pa.Table) else _read(Path(source))
    names = sorted(table.column_names)
    if len(set(names)) < len(names):
        raise InputError("columns", names, "must be different")
    schema = [[name, _kind(name, table.schema.field(name).type)] for name in names]
    columns = [_values(table[name], kind) for name, kind in schema]
    # zip of no columns has no rows: the number of rows is part of the schema then.
    head = canonical_json([*schema, table.num_rows])
    rows = sorted(hashlib.sha256(canonical_json(row)).digest() for row in zip(*columns, strict=True))
    return hashlib.sha256(head + b"".join(rows)).hexdigest()


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(str(path), "missing", "rebuild it with snakemake, or fetch it with dvc pull")
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "delete it and rebuild it with snakemake"
        raise InputError(str(path), f"is not a whole Parquet file ({reason})", mend) from error


def _kind(name: str, found: pa.DataType) -> str:
    """One name for the ways in which Arrow may hold the same values."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found):
        return "text"
    if pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_boolean(found):
        return str(found)
    raise InputError(name, str(found), "must be text, a whole number, a floating-point number or a boolean")


def _values(column: pa.ChunkedArray, kind: str) -> list[object]:
    values: list[object] = column.to_pylist()
    if kind in ("halffloat", "float", "double"):
        return [float(value).hex() if isinstance(value, float) else None for value in values]
    return values
