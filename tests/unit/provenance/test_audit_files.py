"""Bytes, paths and tables as the auditor reads them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.tree import Tree

from gradnoise.base.tables import FLOW, write_table
from gradnoise.provenance.audit import files, history
from gradnoise.provenance.audit.evidence import parse_json, plain, read_json, seed_of
from gradnoise.provenance.audit.findings import Breach
from gradnoise.registration.seeds import derive_seeds


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_folder_has_the_hash_that_dvc_gives_it() -> None:
    texts = {"b.txt": "two", "a.txt": "one", "a/z.txt": "three", "Ä.txt": "four"}
    tree = Tree()
    for name, text in texts.items():
        path = Path("out", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        found = files._md5(path.as_posix())
        assert found is not None
        tree.add(tuple(name.split("/")), None, HashInfo("md5", found[0]))
    tree.digest()
    assert files._md5("out") == (tree.hash_info.value, sum(len(text) for text in texts.values()))
    Path("out/a.txt").write_text("One")
    assert files._md5("out") != (tree.hash_info.value, 15)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", "", "a\nb"])
def test_paths_out_of_the_repository_are_refused(path: str) -> None:
    with pytest.raises(Breach, match="leads out"):
        plain(path)


def test_symbolic_links_are_refused_anywhere_on_the_way() -> None:
    Path("real").mkdir()
    Path("real/file").write_text("x")
    Path("link").symlink_to("real")
    with pytest.raises(Breach, match="link is a symbolic link"):
        plain("link/file")
    assert list(files._walk("real")) == ["real/file"]
    Path("real/inner").symlink_to("..")
    assert sorted(files._walk("real")) == ["real/file", "real/inner"]


@pytest.mark.parametrize(
    "text",
    [
        '{"p": 0.01, "p": 0.9}',
        '{"a": {"x": 1, "x": 1}}',
        "[NaN]",
        "[Infinity]",
        "[1e999]",
        "[1",
        "",
        "[" * 99_999,
    ],
)
def test_ambiguous_json_is_refused(text: str) -> None:
    with pytest.raises(Breach):
        parse_json(text.encode(), "results.json")


def test_missing_json_is_told_with_its_mend() -> None:
    with pytest.raises(Breach, match="dvc pull"):
        read_json("results/quick/analysis/results.json")


def test_seeds_are_those_of_the_registration() -> None:
    assert [seed_of("a" * 64 + "beacon", n) for n in range(5)] == derive_seeds("a" * 64, 5, "beacon")


def faults_of(path: str, rows: int = 2) -> list[str]:
    study = SimpleNamespace(study=SimpleNamespace(label="REGISTERED"))
    evidence: Any = SimpleNamespace(plan=study)
    return list(files._table_faults(evidence, path, rows))


def flow(runs: list[int], cells: str = "ab") -> dict[str, list[object]]:
    return {"block": ["race"] * 2, "cell": list(cells), "stage": ["planned"] * 2, "runs": list(runs)}


def test_whole_table_has_no_fault() -> None:
    write_table("flow.parquet", FLOW, flow([5, 7]), "REGISTERED")
    assert faults_of("flow.parquet") == []


def test_rows_labels_and_repetition() -> None:
    write_table("flow.parquet", FLOW, flow([5, 7], cells="aa"), "REHEARSAL")
    found = "; ".join(faults_of("flow.parquet", rows=3))
    assert "label of another study" in found
    assert "has 2 rows, 3 were recorded" in found
    assert "1 rows are there twice" in found


def test_number_edited_in_the_file_contradicts_the_footer() -> None:
    # A careful forger recomputes checksums, here by having none; the statistics stay those of the old values.
    schema = FLOW.schema().with_metadata({"table": "flow", "label": "REGISTERED"})
    table = pa.table(flow([5, 7]), schema=schema)
    pq.write_table(table, "flow.parquet", compression="none", use_dictionary=False, store_schema=True)
    content = Path("flow.parquet").read_bytes()
    old, new = ((7).to_bytes(8, "little"), (9).to_bytes(8, "little"))
    place = content.index((5).to_bytes(8, "little") + old) + 8
    Path("flow.parquet").write_bytes(content[:place] + new + content[place + 8 :])
    assert faults_of("flow.parquet") == ["runs: statistics say 5 to 7, found 5 to 9"]


def test_table_under_another_name_is_not_taken() -> None:
    write_table("fates.parquet", FLOW, flow([5, 7]), "REGISTERED")
    assert faults_of("fates.parquet") == ["names no table of this place"]


def test_folder_may_gain_records_and_lose_none() -> None:
    def store(digest: str, listing: dict[str, str]) -> str:
        path = Path("dvc-store/files/md5", digest[:2], f"{digest[2:]}.dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"relpath": p, "md5": m} for p, m in listing.items()]))
        return f"{digest}.dir"

    old = store("aa1", {"attempts/a-0001.json": "1", "manifest.json": "2"})
    grown = store("bb2", {"attempts/a-0001.json": "1", "attempts/a-0002.json": "3", "manifest.json": "4"})
    edited = store("cc3", {"attempts/a-0001.json": "9", "manifest.json": "2"})
    assert history._only_grew(old, grown)
    assert not history._only_grew(old, edited)
    assert not history._only_grew(grown, old)
    assert not history._only_grew(old, "dd4.dir")
