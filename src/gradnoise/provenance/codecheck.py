"""`codecheck.yml`: what a codechecker has to reproduce, in CODECHECK's configuration format 1.0.

`python -m gradnoise.provenance.codecheck` writes it for the published study. The nodes that belong to a check
(`codechecker`, `report`, `certificate`) are the codechecker's to add. Format:
https://codecheck.org.uk/spec/config/1.0/. Version 2.0 demands an ORCID of each author and a published
article, and there is neither.
"""

import json

from gradnoise.base import layout, strict_yaml
from gradnoise.base.files import write_bytes
from gradnoise.base.study import Config, load_study, validated
from gradnoise.base.vocabulary import study_label
from gradnoise.figures.names import SPECS
from gradnoise.provenance.citation import read_citation

WRITER = "python -m gradnoise.provenance.codecheck"
SPECIFICATION = "https://codecheck.org.uk/spec/config/1.0/"


def captions(study: str) -> dict[str, str]:
    """What people look at, by path: each figure and its plot data, the numbers, the report."""
    said = {}
    for spec in SPECS:
        said[layout.figure(study, spec.name, "svg")] = f"Figure {spec.number}: {spec.title}"
        said[layout.figure(study, spec.name, "parquet")] = f"Plot data of figure {spec.number}"
    said[layout.results(study)] = "Every number of the analysis, in full precision"
    said[layout.report(study)] = "The report"
    return said


def codecheck() -> str:
    """The text of codecheck.yml for the study that `config/config.yaml` names, each comment with its label.

    Run from the repository root. Raises `InputError` where the study's files or `CITATION.cff` have a fault.
    """
    config = "config/config.yaml"
    study = validated(Config, strict_yaml.load(config), config).study
    label = study_label(load_study(study))
    citation = read_citation()
    lines = ["%YAML 1.1", "---", f"# Written by {WRITER}", f"version: {SPECIFICATION}", "", "manifest:"]
    for file, caption in captions(study).items():
        lines += [f"  - file: {file}", f"    comment: {_quoted(f'{label}. {caption}')}"]
    lines += ["", "paper:", f"  title: {_quoted(citation.title)}", "  authors:"]
    for author in citation.authors:
        lines.append(f"    - name: {_quoted(author.known_as)}")
        if author.orcid:
            lines.append(f"      ORCID: {author.orcid.rpartition('/')[2]}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A JSON string is a YAML string."""
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    write_bytes("codecheck.yml", codecheck().encode())
