"""What a crate says: the entities of a Provenance Run Crate 0.5, made from records, manifest and plan.

| in the repository | in the crate |
|---|---|
| the Snakefile | main entity: `ComputationalWorkflow`, with a `HowToStep` for each rule that ran |
| `gradnoise run PHASE` | `SoftwareApplication`, with a `FormalParameter` for each input, output and setting |
| a finished attempt | `CreateAction`, and the `ControlAction` of its step |
| the study | `CreateAction` of the workflow, and the `OrganizeAction` of Snakemake |
| what a job read of another | `ParameterConnection` |
| a setting, the seeds of a job's runs | `PropertyValue`: its canonical JSON |

Every identifier follows from names in the records, every time from their times.
Profile: https://w3id.org/ro/wfrun/provenance/0.5.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gradnoise.base.environment import LOCK
from gradnoise.base.files import canonical_json, sha256_of
from gradnoise.base.study import study_path
from gradnoise.provenance.citation import Citation
from gradnoise.provenance.codecheck import captions
from gradnoise.provenance.records import File, Record

if TYPE_CHECKING:
    from rocrate.rocrate import ROCrate

WORKFLOW = "Snakefile"
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/provenance/0.5": ("Provenance Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
SNAKEMAKE = "https://w3id.org/workflowhub/workflow-ro-crate#snakemake"
REQUIREMENTS_FORMAT = "https://pip.pypa.io/en/stable/reference/requirements-file-format/"
# Terms of the profile that the context of RO-Crate 1.1 lacks.
RUN_TERMS = (
    *("ParameterConnection", "connection", "sourceParameter", "targetParameter"),
    *("environment", "resourceUsage", "sha256"),
)
TERMS = {
    **{term: f"https://w3id.org/ro/terms/workflow-run#{term}" for term in RUN_TERMS},
    "buildInstructions": "https://codemeta.github.io/terms/buildInstructions",
}
THREADS = "OMP_NUM_THREADS"
# Unit (of QUDT) and meaning of what a record says of a job's use of the machine.
USAGE = {
    "cpu_seconds": ("SEC", "User and system time of the job's process and of the children it waited for"),
    "peak_memory_bytes": ("BYTE", "Largest resident set of the job's process"),
}
# By the ending of a name; all else is plain text. Python's own table differs from system to system.
_MEDIA_TYPES = {
    ".parquet": "application/vnd.apache.parquet",
    ".yaml": "application/yaml",
    ".cff": "application/yaml",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".html": "text/html",
    ".toml": "application/toml",
}

Reference = dict[str, str]


@dataclass(frozen=True)
class Evidence:
    """What a crate is made from, every byte of it checked.

    `results` are the files that the manifest lists; `wrote` the id of the attempt behind each. `records` are
    these attempts, oldest first, `attempts` the files of all attempts, by id. `sources` are the files of the
    repository that the study came from, with `plans` among them; `rules` the rule of each phase, in the
    order of the workflow.
    """

    study: str
    label: str
    citation: Citation
    manifest: File
    results: tuple[File, ...]
    wrote: dict[str, str]
    records: tuple[Record, ...]
    attempts: dict[str, File]
    sources: tuple[File, ...]
    plans: tuple[str, ...]
    rules: dict[str, str]

    @property
    def files(self) -> tuple[File, ...]:
        """Every file of the crate but its metadata."""
        return (*self.results, self.manifest, *self.attempts.values(), *self.sources)


def identifier(study: str) -> str:
    """By which a crate of the study is known again."""
    return f"gradnoise study {study}"


def build(evidence: Evidence, root: Path) -> "ROCrate":
    """The crate of a study, in memory; `root` is the folder that its files lie in."""
    return _Builder(evidence, root).build()


class _Builder:
    """Adds one entity after the other; a part that two entities share is added once."""

    def __init__(self, evidence: Evidence, root: Path) -> None:
        from rocrate.rocrate import ROCrate

        self.evidence = evidence
        self.root = root
        self.crate = ROCrate(version="1.1")
        self.captions = captions(evidence.study)
        self.record_of = {record.id: record for record in evidence.records}
        # Files of the manifest by the attempt that wrote them.
        self.written: dict[str, list[File]] = defaultdict(list)
        for file in evidence.results:
            self.written[evidence.wrote[file.path]].append(file)
        # What the file of an attempt record is about, where the attempt is an action of the crate.
        self.about = {evidence.attempts[name].path: _action(name) for name in self.record_of}
        self.about[evidence.manifest.path] = "#run"
        # The version in the newest record that knows one.
        versions = [record.environment.packages.get("snakemake") for record in evidence.records]
        self.snakemake = next((version for version in reversed(versions) if version), None)
        # By phase: its step, and the outputs of its tool.
        self.steps: dict[str, Reference] = {}
        self.outputs: dict[str, list[Reference]] = {}
        # Formal parameters that a file stands for, by the file's path.
        self.slots: dict[str, dict[str, Reference]] = defaultdict(dict)

    def build(self) -> "ROCrate":
        self.crate.metadata.extra_terms.update(TERMS)
        phases = self._phases()
        for phase in phases:
            self._tool(phase)
        for number, phase in enumerate(phases, 1):
            self._step(phase, number)
        actions = [self._job(record) for record in self.evidence.records]
        run = self._run(phases, [control for _, control in actions])
        for file in self.evidence.files:
            self._file(file)
        self._root([*run, *(action for action, _ in actions)])
        return self.crate

    def _of(self, phase: str) -> list[Record]:
        return [record for record in self.evidence.records if record.phase == phase]

    def _phases(self) -> list[str]:
        """Phases that ran, each behind those whose outputs it read; else in the order of the workflow."""
        reads: dict[str, set[str]] = {phase: set() for phase in self.evidence.rules if self._of(phase)}
        for record in self.evidence.records:
            writers = filter(None, map(self._writer, record.inputs))
            reads[record.phase] |= {writer.phase for writer in writers} - {record.phase}
        order: list[str] = []
        while left := [phase for phase in reads if phase not in order]:
            order.append(next((phase for phase in left if reads[phase] <= set(order)), left[0]))
        return order

    def _writer(self, file: File) -> Record | None:
        """The attempt that wrote a file; None for a source."""
        name = self.evidence.wrote.get(file.path)
        return self.record_of[name] if name else None

    def _add(self, identity: str, kind: str, **properties: Any) -> Reference:
        """Add a contextual entity, once; gives a reference to it."""
        from rocrate.model.contextentity import ContextEntity

        if self.crate.get(identity) is None:
            self.crate.add(ContextEntity(self.crate, identity, {"@type": kind, **_stated(properties)}))
        return {"@id": identity}

    def _root(self, actions: list[Reference]) -> None:
        """The root: what the crate is, for people and for finding it."""
        evidence, citation = self.evidence, self.evidence.citation
        profiles = [
            self._add(uri, "CreativeWork", name=f"{name} {version}", version=version)
            for uri, (name, version) in PROFILES.items()
        ]
        licence = self._add(
            f"https://spdx.org/licenses/{citation.license}",
            "CreativeWork",
            name=citation.license,
            description=f"The licence {citation.license}; its text is the file LICENSE.",
        )
        authors = [
            self._add(
                author.orcid or f"#author/{number}",
                "Organization" if author.name else "Person",
                name=author.known_as,
            )
            for number, author in enumerate(citation.authors, 1)
        ]
        self.crate.metadata["conformsTo"] = [{"@id": self.crate.metadata.profile}, profiles[-1]]
        about = {
            "name": f"Study {evidence.study} ({evidence.label}). {citation.title}",
            "description": f"{evidence.label}. Every file of the study {evidence.study}, the attempt that "
            "wrote it, and what decided that attempt: a view of the study's manifest and attempt records.",
            "identifier": identifier(evidence.study),
            "datePublished": max(_end(record) for record in evidence.records),
            "license": licence,
            "author": authors,
            "keywords": ", ".join(citation.keywords),
            "conformsTo": profiles,
            "mainEntity": {"@id": WORKFLOW},
            "mentions": actions,
        }
        for name, value in _stated(about).items():
            self.crate.root_dataset[name] = value

    def _file(self, file: File) -> None:
        """A file, the parameters that it stands for, and the action that a record is about."""
        properties: dict[str, Any] = {
            "name": self.captions.get(file.path, file.path),
            "sha256": file.sha256,
            "contentSize": str(file.size),
            "encodingFormat": _media_type(file.path),
            "exampleOfWork": list(self.slots[file.path].values()),
        }
        if file.path in self.about:
            properties["about"] = {"@id": self.about[file.path]}
        if file.path == WORKFLOW:
            properties |= self._workflow()
        elif file.path == LOCK:
            conforms = self._add(REQUIREMENTS_FORMAT, "CreativeWork", name="Requirements file format of pip")
            properties |= {"conformsTo": conforms, "description": self._lock_description(file)}
        self.crate.add_file(self.root / file.path, file.path, properties=_stated(properties))

    def _lock_description(self, lock: File) -> str:
        """Whether the lock file is the one that the jobs ran under."""
        recorded = sorted({record.environment.lock_sha256 for record in self.evidence.records})
        if recorded == [lock.sha256]:
            return "The lock file that every job ran under."
        return (
            "The lock file at the time of this export, with the same pins of the packages that decide a "
            f"result. The jobs ran under the one with SHA-256 {', '.join(recorded)}."
        )

    def _workflow(self) -> dict[str, Any]:
        """What the Snakefile is, beside a file."""
        self._add(
            SNAKEMAKE,
            "ComputerLanguage",
            name="Snakemake",
            version=self.snakemake,
            url={"@id": "https://snakemake.readthedocs.io"},
            identifier={"@id": "https://doi.org/10.1093/bioinformatics/bts480"},
        )
        bioschemas = self._add(BIOSCHEMAS, "CreativeWork", name="Bioschemas ComputationalWorkflow 1.0")
        threads = {"@id": f"#environment/{THREADS}"}
        return {
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"],
            "name": "The study, from data to report",
            "version": self.evidence.citation.version,
            "programmingLanguage": {"@id": SNAKEMAKE},
            "conformsTo": bioschemas,
            "license": {"@id": f"https://spdx.org/licenses/{self.evidence.citation.license}"},
            "hasPart": [{"@id": _tool_id(phase)} for phase in self.steps],
            "step": list(self.steps.values()),
            "input": {"@id": "#workflow/input/study"},
            "output": [output for outputs in self.outputs.values() for output in outputs],
            "environment": threads if self.crate.get(threads["@id"]) else None,
            "buildInstructions": {"@id": LOCK},
        }

    def _tool(self, phase: str) -> None:
        """`gradnoise run PHASE`: its parameters, and the packages that can change its bytes."""
        records = self._of(phase)
        newest = records[-1]
        inputs = self._slots(phase, "input", (file for record in records for file in record.inputs))
        settings = dict.fromkeys(key for record in records for key in record.settings)
        inputs += [self._parameter(f"#{phase}/setting/{key}", key, "Text") for key in settings]
        if any(record.runs for record in records):
            inputs.append(self._parameter(f"#{phase}/runs", "runs", "Text"))
        written = (file for record in records for file in self.written[record.id])
        self.outputs[phase] = self._slots(phase, "output", written)
        self._add(
            _tool_id(phase),
            "SoftwareApplication",
            name=f"gradnoise run {phase}",
            description=f"Phase {phase}, module {newest.module}. The identifier is the SHA-256 of the "
            "canonical JSON of its code closure: the hash of each of its files, as the records list them.",
            softwareVersion=f"{self.evidence.citation.version}+{newest.code.sha256[:12]}",
            identifier=newest.code.sha256,
            softwareRequirements=[self._package(*pin) for pin in sorted(newest.pins.items())],
            input=inputs,
            output=self.outputs[phase],
        )

    def _package(self, name: str, version: str | None) -> Reference:
        # A package URL (purl): the same name wherever the package is fetched from.
        identity = f"pkg:pypi/{name}@{version}" if version else f"pkg:pypi/{name}"
        return self._add(identity, "SoftwareApplication", name=name, softwareVersion=version)

    def _slots(self, phase: str, side: str, files: Iterable[File]) -> list[Reference]:
        """A parameter for each kind of file that the phase's jobs read or write."""
        slots = {}
        for file in files:
            name = _kind(file.path)
            slot = self._parameter(f"#{phase}/{side}/{quote(name)}", name, "File", _media_type(file.path))
            slots[name] = self.slots[file.path][slot["@id"]] = slot
        return list(slots.values())

    def _parameter(self, identity: str, name: str, kind: str, encoding: str | None = None) -> Reference:
        return self._add(identity, "FormalParameter", name=name, additionalType=kind, encodingFormat=encoding)

    def _step(self, phase: str, number: int) -> None:
        """The rule of a phase, and which outputs of other phases it reads."""
        connections = {}
        for file in (file for record in self._of(phase) for file in record.inputs):
            if writer := self._writer(file):
                kind = quote(_kind(file.path))
                source, target = f"{writer.phase}/output/{kind}", f"{phase}/input/{kind}"
                connections[source, target] = self._add(
                    f"#connection/{source}/{target}",
                    "ParameterConnection",
                    sourceParameter={"@id": f"#{source}"},
                    targetParameter={"@id": f"#{target}"},
                )
        self.steps[phase] = self._add(
            f"#step/{phase}",
            "HowToStep",
            name=self.evidence.rules[phase],
            position=str(number),
            workExample={"@id": _tool_id(phase)},
            connection=list(connections.values()),
        )

    def _job(self, record: Record) -> tuple[Reference, Reference]:
        """An attempt: the action of its tool, and the one of its rule."""
        command = f"gradnoise run {record.phase}"
        name = record.name if record.name == record.phase else f"{record.phase} {record.name}"
        decided = [
            self._value(f"#{record.phase}/setting/{key}", key, value)
            for key, value in record.settings.items()
        ]
        if record.runs:
            runs = [run.model_dump(mode="json") for run in record.runs]
            decided.append(self._value(f"#{record.phase}/runs", "runs", runs))
        plan = [_data(record.plan.path)] if record.plan else []
        action = self._add(
            _action(record.id),
            "CreateAction",
            name=f"{name}, attempt {record.attempt}",
            description=f"{command} of study {record.study}. {_circumstances(record)}",
            instrument={"@id": _tool_id(record.phase)},
            object=[*(_data(file.path) for file in record.inputs), *plan, *decided],
            result=[_data(file.path) for file in self.written[record.id]],
            startTime=record.start,
            endTime=_end(record),
            actionStatus="http://schema.org/CompletedActionStatus",
            subjectOf=_data(self.evidence.attempts[record.id].path),
            environment=self._threads(record),
            resourceUsage=self._usage(record),
        )
        control = self._add(
            f"#control/{record.id}",
            "ControlAction",
            name=f"rule {self.evidence.rules[record.phase]}: {name}",
            instrument=self.steps[record.phase],
            object=action,
            actionStatus="http://schema.org/CompletedActionStatus",
        )
        return action, control

    def _value(self, parameter: str, name: str, value: object) -> Reference:
        """What a job was given for a parameter: the same value is the same entity."""
        return self._add(
            f"{parameter}/{sha256_of(value)[:12]}",
            "PropertyValue",
            name=name,
            value=canonical_json(value).decode(),
            exampleOfWork={"@id": parameter},
        )

    def _threads(self, record: Record) -> Reference | None:
        """The environment variable on which the order of sums depends."""
        if (number := record.environment.omp_num_threads) is None:
            return None
        parameter = self._parameter(f"#environment/{THREADS}", THREADS, "Text")
        return self._add(
            f"#environment/{THREADS}/{number}",
            "PropertyValue",
            name=THREADS,
            value=number,
            exampleOfWork=parameter,
        )

    def _usage(self, record: Record) -> list[Reference]:
        """Processor time and memory of an attempt."""
        used = {"cpu_seconds": record.cpu_seconds, "peak_memory_bytes": record.peak_memory_bytes}
        return [
            self._add(
                f"#usage/{record.id}/{name}",
                "PropertyValue",
                name=name,
                value=str(value),
                unitCode=f"https://qudt.org/vocab/unit/{USAGE[name][0]}",
                propertyID=self._add(f"#usage/{name}", "DefinedTerm", name=name, description=USAGE[name][1]),
            )
            for name, value in used.items()
            if value is not None
        ]

    def _run(self, phases: list[str], controls: list[Reference]) -> list[Reference]:
        """The whole study: the action of the workflow, and the one of the engine that ran its rules."""
        evidence = self.evidence
        times = {
            "startTime": min(record.start for record in evidence.records),
            "endTime": max(_end(record) for record in evidence.records),
            "actionStatus": "http://schema.org/CompletedActionStatus",
        }
        study = self._parameter("#workflow/input/study", "study", "Text")
        chosen = self._add(
            f"#workflow/input/study/{evidence.study}",
            "PropertyValue",
            name="study",
            value=evidence.study,
            exampleOfWork=study,
        )
        read = (study_path(evidence.study).as_posix(), *evidence.plans)
        run = self._add(
            "#run",
            "CreateAction",
            name=f"Study {evidence.study}",
            description=f"All jobs of study {evidence.study}: phases {', '.join(phases)}.",
            instrument={"@id": WORKFLOW},
            object=[chosen, *map(_data, read)],
            result=[_data(file.path) for file in evidence.results],
            **times,
        )
        organise = self._add(
            "#organise",
            "OrganizeAction",
            name=f"Snakemake runs the jobs of study {evidence.study}",
            instrument=self._package("snakemake", self.snakemake),
            object=controls,
            result=run,
            **times,
        )
        return [run, organise]


def _stated(properties: dict[str, Any]) -> dict[str, Any]:
    """Properties that have a value; a list of one is that one, as the specification asks."""
    values = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in properties.items()
    }
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def _kind(path: str) -> str:
    """The file's name without the seeds of its job: `s00-04.scores.parquet` is `scores.parquet`."""
    return re.sub(r"^s\d+-\d+\.", "", Path(path).name)


def _media_type(path: str) -> str:
    return _MEDIA_TYPES.get(Path(path).suffix, "text/plain")


def _data(path: str) -> Reference:
    """A reference to a file of the crate, whose identifier is a URI."""
    return {"@id": quote(path)}


def _tool_id(phase: str) -> str:
    return f"#gradnoise-run-{phase}"


def _action(record_id: str) -> str:
    return f"#attempt/{record_id}"


def _end(record: Record) -> str:
    """When a finished attempt ended."""
    assert record.end is not None, f"{record.id} is {record.status}"
    return record.end


def _circumstances(record: Record) -> str:
    """On which commit and which kind of machine an attempt ran; its host is in its record."""
    environment, commit = record.environment, record.commit
    version = f"commit {commit.sha}{' with uncommitted changes' if commit.dirty else ''}" if commit else ""
    machine = (environment.platform, environment.processor, environment.cpu_capability, environment.gpu)
    parts = (version or "no Git commit known", f"Python {environment.python}", *filter(None, machine))
    return f"It ran on {', '.join(parts)}."
