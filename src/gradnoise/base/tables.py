"""Every table of the project: its schema, how it is written and how it is checked on reading.

Tables are long-format Parquet. The same rows give the same bytes: no time, no host, a fixed codec, and page
checksums that reading verifies. Units and meanings travel in the column metadata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradnoise.base.errors import InputError
from gradnoise.base.files import atomic

_TYPES = {
    "text": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
}


@dataclass(frozen=True)
class Column:
    """One column: name, type (`text`, `int`, `float`, `bool`), unit, meaning, and whether it may be null."""

    name: str
    type: str
    meaning: str
    unit: str = ""
    nullable: bool = False

    def field(self) -> pa.Field:
        metadata = {"meaning": self.meaning, "unit": self.unit}
        return pa.field(self.name, _TYPES[self.type], nullable=self.nullable, metadata=metadata)


@dataclass(frozen=True)
class Table:
    """A table's name and columns."""

    name: str
    columns: tuple[Column, ...]

    def schema(self) -> pa.Schema:
        return pa.schema([column.field() for column in self.columns], metadata={"table": self.name})


_RUN = (
    Column("run_id", "text", "hash of plan, block, cell and seed index"),
    Column("block", "text", "block of the study"),
    Column("cell", "text", "cell of the block's design"),
    Column("seed_index", "int", "position in the study's derived list of seeds"),
)
_SEGMENT = Column("segment", "int", "0: trunk; k: the k-th annealed branch")

PLAYS = Table(
    "plays",
    (
        Column("play", "text", "name of the play"),
        Column("split", "text", "train or validation"),
        Column("text", "text", "cleaned text"),
        Column("characters", "int", "length of the cleaned text", "characters"),
        Column("sha256", "text", "SHA-256 of the cleaned text in UTF-8"),
    ),
)

TRAJECTORY = Table(
    "trajectory",
    (
        *_RUN,
        _SEGMENT,
        Column("step", "int", "updates done since the start of the run, at the end of the window", "updates"),
        Column("sequences", "int", "sequences seen since the start of the run", "sequences"),
        Column("learning_rate", "float", "learning rate of the window's last update"),
        Column("loss", "float", "mean training loss over the window; null if not finite", "nats", True),
        Column("loss_hash", "text", "rolling SHA-256 of every step's loss up to here"),
    ),
)

_TRACE = (
    Column("step", "int", "update that was measured, counted from 1", "updates"),
    Column("updates", "int", "updates that the event stands for, itself the first (dt)", "updates"),
    Column("sum_lr", "float", "sum of the effective learning rates of the updates covered"),
    Column("sum_lr2", "float", "sum of their squares"),
    Column("sum_lr2_c", "float", "sum of their squares, for trace_c"),
    Column("log_retention", "float", "sum of 2 log(1 - learning rate x decoupled weight decay)"),
    Column("trace_pcp", "float", "Tr(P C/B P), unbiased", "squared parameter / squared learning rate"),
    Column("trace_pcp_se", "float", "its standard error (jackknife over contributions)"),
    Column("trace_c", "float", "Tr(C/B), unbiased", "squared gradient"),
    Column("trace_c_se", "float", "its standard error (jackknife over contributions)"),
    Column("injected_pne", "float", "what was injected, sum of learning rate x Tr(P N P): part of pne"),
    Column("injected_pne2", "float", "the same of learning rate^2: part of pne2", "squared parameter"),
    Column("injected_ne", "float", "sum of learning rate^2 x Tr(N) injected: part of ne"),
)

NOISE_EVENTS = Table(
    "noise_events",
    (
        *_RUN,
        _SEGMENT,
        *_TRACE,
        Column("learning_rate", "float", "learning rate of the measured update"),
        Column("contributions", "int", "independent gradient contributions R"),
        Column("batch", "int", "sequences in the update", "sequences"),
        Column("tokens", "int", "tokens in the update", "tokens"),
        Column("clip", "float", "factor that gradient clipping multiplied the gradient by"),
        Column("clip_rate", "float", "share of the updates so far that were clipped"),
        Column("trace_effective", "float", "trace that the update carried, after clipping", "as trace_pcp"),
        Column("trace_effective_se", "float", "its standard error"),
        Column("trace_p", "float", "Tr P", "parameter / (learning rate x gradient)"),
        Column("signal_pcp", "float", "squared norm of P times the batch gradient", "as trace_pcp"),
        Column("signal_pcp_se", "float", "error of signal_pcp - trace_pcp, the unbiased signal"),
        Column("covariance_pcp", "float", "its covariance with trace_pcp"),
        Column("signal_c", "float", "squared norm of the batch gradient", "squared gradient"),
        Column("signal_c_se", "float", "error of signal_c - trace_c, the unbiased signal"),
        Column("covariance_c", "float", "its covariance with trace_c"),
        Column("effective_rank", "float", "(tr S)^2 / tr S^2 of S = P C/B P", "", True),
        Column("effective_rank_se", "float", "its standard error (jackknife over contributions)", "", True),
        Column("top_share", "float", "share of the largest sample eigenvalue in the trace", "", True),
        Column("curvature", "float", "Tr(P F_token P), the last one measured", "", True),
        Column("curvature_se", "float", "its standard error", "", True),
        Column("curvature_step", "int", "update at which it was measured; 0 for never", "updates"),
        Column("hill", "float", "Hill index of standardised coordinates", "", True),
        Column("hill_se", "float", "its standard error", "", True),
        Column("hill_gaussian", "float", "what Gaussian noise gives under the same steps", "", True),
        Column("hill_raw", "float", "Hill index of raw coordinates", "", True),
        Column("norm_hill", "float", "Hill index of the norms of contributions", "", True),
        Column("norm_hill_gaussian", "float", "what Gaussian noise of that rank gives", "", True),
        Column("gradient_norm", "float", "norm of the batch gradient before clipping", "gradient"),
        Column("second_moment", "float", "mean of the optimizer's second moment", "squared gradient", True),
        Column("loss", "float", "training loss of the measured update", "nats", True),
        Column("population_factor", "float", "1 - B/N without replacement, in every variance; else 1"),
    ),
)

_PART = (
    Column("kind", "text", "layer or class"),
    Column("part", "text", "name of the layer or class"),
)

NOISE_PARTS = Table(
    "noise_parts",
    (Column("run_id", "text", "hash of plan, block, cell and seed index"), _SEGMENT, *_PART, *_TRACE),
)

SCORES = Table(
    "scores",
    (
        *_RUN,
        Column("batch", "int", "batch size", "sequences"),
        Column("learning_rate", "float", "learning rate of the trunk"),
        Column("branch", "int", "number of the annealed branch, from 1"),
        Column("at", "text", "what placed the branch: sequences or updates"),
        Column("trunk_sequences", "int", "sequences at which the branch left the trunk", "sequences"),
        Column("updates", "int", "updates at the branch's end, trunk included", "updates"),
        Column("sequences", "int", "sequences at the branch's end, trunk included", "sequences"),
        Column("sum_lr", "float", "sum of learning rates at the branch's end, trunk included"),
        Column("status", "text", "finished or diverged"),
        Column("score", "text", "name of the score"),
        Column("value", "float", "the score; null if the run diverged", "", True),
        Column("stderr", "float", "its standard error; null if the run diverged", "", True),
        Column("unit", "text", "unit of the score"),
    ),
)

EXPOSURE = Table(
    "exposure",
    (
        *_RUN,
        Column("branch", "int", "number of the annealed branch, from 1"),
        Column("definition", "text", "a sum over updates (pne2, ...) or a mean over events (gns, ...)"),
        Column(
            "value", "float", "integrated to, or averaged up to, the branch's end; null if unknown", "", True
        ),
        Column("stderr", "float", "its standard error; null if unknown", "", True),
        Column("unit", "text", "unit of the definition"),
        Column("events", "int", "measured updates behind it"),
    ),
)

EXPOSURE_PARTS = Table(
    "exposure_parts",
    (
        *_RUN,
        Column("branch", "int", "number of the annealed branch, from 1"),
        *_PART,
        Column("definition", "text", "pne, pne2, ne or retained"),
        Column("value", "float", "the part's share of the exposure"),
        Column("stderr", "float", "its standard error"),
        Column("unit", "text", "unit of the definition"),
    ),
)

MATCHED = Table(
    "matched",
    (
        *_RUN,
        Column("batch", "int", "batch size", "sequences"),
        Column("learning_rate", "float", "learning rate of the trunk"),
        Column("matching", "text", "loss, updates or tokens"),
        Column("quantity", "text", "a score, or log10_pne, log10_pne2, updates, sequences, sum_lr"),
        Column("value", "float", "its value at the matched point"),
    ),
)

FLOW = Table(
    "flow",
    (
        Column("block", "text", "block of the study"),
        Column("cell", "text", "cell of the block's design"),
        Column("stage", "text", "planned, started, finished, matched, excluded or analysed"),
        Column("runs", "int", "runs that reached the stage", "runs"),
    ),
)

_FATE = Column("fate", "text", "analysed, excluded, unmatched, diverged, missing or not compared")

FATES = Table(
    "fates",
    (*_RUN, _FATE, Column("rule", "text", "the exclusion that left the run out", "", True)),
)

CURVES = Table(
    "curves",
    (
        Column("matching", "text", "loss, updates or tokens"),
        Column("curve", "text", "mixed_model or isotonic"),
        Column("x", "float", "predictor, as the plan transforms it"),
        Column("y", "float", "fitted outcome"),
        Column("low", "float", "lower end of the band; null where none is given", "", True),
        Column("high", "float", "upper end of the band; null where none is given", "", True),
    ),
)

EXPLAINED = Table(
    "explained",
    (
        Column("matching", "text", "loss, updates or tokens"),
        Column("predictor", "text", "log10_pne2, log10_updates, log10_sum_lr, ..."),
        Column("statistic", "text", "what is reported, e.g. r2_within_seed"),
        Column("value", "float", "its estimate"),
        Column("low", "float", "lower end of its interval; null where none is given", "", True),
        Column("high", "float", "upper end of its interval; null where none is given", "", True),
        Column("runs", "int", "runs behind it", "runs"),
    ),
)


def write_table(
    path: Path | str,
    table: Table,
    columns: Mapping[str, Sequence[object]] | pa.Table,
    label: str,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write `columns` under the schema of `table`, atomically.

    `label`, the study's (REHEARSAL or REGISTERED), and `notes` become file metadata.

    Raises `InputError` naming file and column for a missing or unknown column, a value of the wrong type, a
    null where none is allowed, and any NaN or infinity (an absent number is a null).
    """
    schema = table.schema().with_metadata({"table": table.name, "label": label, **(notes or {})})
    given = columns.column_names if isinstance(columns, pa.Table) else list(columns)
    if set(given) != set(schema.names):
        odd = sorted(set(given) ^ set(schema.names))
        raise InputError(str(path), f"columns {odd}", f"table {table.name} has exactly {schema.names}")
    try:
        arrays = [
            pa.chunked_array(columns[name], schema.field(name).type).combine_chunks()
            if isinstance(columns, pa.Table)
            else pa.array(columns[name], schema.field(name).type)
            for name in schema.names
        ]
        rows = pa.Table.from_arrays(arrays, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(str(path), reason, f"mend the column of table {table.name}") from error
    _check(path, table, rows)
    with atomic(path) as temporary:
        pq.write_table(
            rows,
            temporary,
            # Every version stays in the store: the stronger level takes a tenth off the corpus, in 2 seconds.
            compression="zstd",
            compression_level=19,
            # Measured numbers do not repeat, so a dictionary only adds to them; their bytes side by side do.
            use_dictionary=[column.name for column in table.columns if column.type != "float"],
            use_byte_stream_split=[column.name for column in table.columns if column.type == "float"],
            write_page_checksum=True,
            store_schema=True,
        )


def read_table(path: Path | str, table: Table) -> pa.Table:
    """Read a Parquet file and hold it against the schema of `table`.

    Raises `InputError` when the file is missing, truncated or corrupt (page checksums are verified), has
    other columns, carries no label, or holds a null, NaN or infinity where none is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(str(path), "missing", "rebuild it with snakemake, or fetch it with dvc pull")
    try:
        rows = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "delete it and rebuild it with snakemake"
        raise InputError(str(path), f"is not a whole Parquet file ({reason})", mend) from error
    if not rows.schema.equals(table.schema(), check_metadata=False):
        raise InputError(
            str(path), f"columns {rows.schema.names}", f"expected table {table.name}: {table.schema().names}"
        )
    if b"label" not in (rows.schema.metadata or {}):
        raise InputError(str(path), "carries no label of its study", "rebuild it with snakemake")
    _check(path, table, rows)
    return rows


def label_of(rows: pa.Table) -> str:
    """The label of its study that a table carries which was read by `read_table`."""
    label: bytes = rows.schema.metadata[b"label"]
    return label.decode()


def _check(path: Path | str, table: Table, rows: pa.Table) -> None:
    for column in table.columns:
        values = rows[column.name]
        if values.null_count and not column.nullable:
            raise InputError(f"{path}: {column.name}", "null", "every row needs a value")
        if column.type == "float" and not pc.all(pc.is_finite(values), min_count=0).as_py():
            raise InputError(f"{path}: {column.name}", "NaN or infinity", "write null for an absent number")


# Plot data: what a figure draws, one row a mark. Columns that a kind of mark does not have are null.
_MARK = (
    Column("matching", "text", "loss, updates or tokens"),
    Column("run_id", "text", "the run of a point", "", True),
    Column("cell", "text", "its cell", "", True),
    Column("seed_index", "int", "its seed", "", True),
    Column("batch", "int", "its batch size", "sequences", True),
    Column("learning_rate", "float", "its learning rate", "", True),
    Column("x", "float", "position on the horizontal axis"),
    Column("y", "float", "position on the vertical axis; null for a statistic", "", True),
    Column("low", "float", "lower end of the band or interval", "", True),
    Column("high", "float", "upper end of the band or interval", "", True),
)

FIGURE_EXPOSURE = Table(
    "figure_exposure",
    (Column("mark", "text", "run, mixed_model or isotonic"), *_MARK),
)

FIGURE_CONFOUNDERS = Table(
    "figure_confounders",
    (
        Column("mark", "text", "run (a point at x, y) or r2_within_seed (a statistic at x)"),
        Column("predictor", "text", "log10_pne2, log10_updates or log10_sum_lr"),
        *_MARK,
    ),
)

FIGURE_FLOW = Table("figure_flow", FLOW.columns)
