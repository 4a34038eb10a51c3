"""codecheck.yml lists what there is to reproduce, as the repository's own files say."""

import shutil
from pathlib import Path

import pytest
from tests.workflow.project import ROOT, published_study

from gradnoise.base import layout, strict_yaml
from gradnoise.base.errors import InputError
from gradnoise.figures.names import FIGURE_NAMES
from gradnoise.provenance.codecheck import WRITER, codecheck


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: what codecheck.yml is made from."""
    for folder in ("config", "preregistration"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copyfile(ROOT / "CITATION.cff", tmp_path / "CITATION.cff")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("repository")
def test_the_file_of_this_repository_is_up_to_date() -> None:
    assert (ROOT / "codecheck.yml").read_text() == codecheck(), f"run {WRITER}"


def test_it_lists_every_figure_with_a_caption_and_the_authors_of_the_citation() -> None:
    assert (ROOT / "codecheck.yml").read_text().splitlines()[:2] == ["%YAML 1.1", "---"]
    read: dict[str, object] = strict_yaml.load(ROOT / "codecheck.yml")
    assert read["version"] == "https://codecheck.org.uk/spec/config/1.0/"
    assert isinstance(read["manifest"], list)
    assert isinstance(read["paper"], dict)
    listed = {item["file"]: item["comment"] for item in read["manifest"]}
    for name in FIGURE_NAMES:
        number = int(name.split("-")[1])
        comment = listed[layout.figure(published_study(), name, "svg")]
        assert f". Figure {number}: " in comment
    citation = strict_yaml.load(ROOT / "CITATION.cff")
    assert isinstance(citation["authors"], list)
    assert [author["name"] for author in read["paper"]["authors"]] == [
        author["name"] for author in citation["authors"]
    ]
    assert read["paper"]["title"] == citation["title"]


def test_a_person_has_both_names_and_the_bare_orcid(repository: Path) -> None:
    (repository / "CITATION.cff").write_text(
        "title: 'A: \"b\"'\nversion: 1.0.0\nlicense: MIT\nauthors:\n"
        "  - {given-names: Josiah, family-names: Carberry, orcid: https://orcid.org/0000-0002-1825-0097}\n"
    )
    (repository / "codecheck.yml").write_text(codecheck())
    paper = strict_yaml.load("codecheck.yml")["paper"]
    assert paper == {
        "title": 'A: "b"',
        "authors": [{"name": "Josiah Carberry", "ORCID": "0000-0002-1825-0097"}],
    }


def test_a_citation_without_authors_is_refused(repository: Path) -> None:
    (repository / "CITATION.cff").write_text("title: x\nversion: 1.0.0\nlicense: MIT\nauthors: []\n")
    with pytest.raises(InputError, match=r"CITATION.cff: authors: "):
        codecheck()
