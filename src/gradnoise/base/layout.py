"""The path grammar of `results/`, once: the Snakefile's patterns and the commands' paths come from here.

Every function also takes Snakemake's wildcards (`"{study}"`) in place of values.
"""

RUN_TABLES = ("scores", "trajectory", "noise_events", "noise_parts")
ANALYSIS_TABLES = ("matched", "fates", "flow", "curves", "explained")


def plays(study: str) -> str:
    """The prepared corpus of block `text`."""
    return f"results/{study}/data/plays.parquet"


def run(study: str, block: str, cell: str, chunk: str, table: str) -> str:
    """One table of one training job."""
    return f"results/{study}/runs/{block}/{cell}/{chunk}.{table}.parquet"


def scores(study: str) -> str:
    """Scores of every branch of every run."""
    return f"results/{study}/scores/scores.parquet"


def exposure(study: str) -> str:
    """Exposure of every branch of every run, by definition."""
    return f"results/{study}/noise/exposure.parquet"


def exposure_parts(study: str) -> str:
    """The same by parameter tensor."""
    return f"results/{study}/noise/exposure_parts.parquet"


def analysis(study: str, table: str) -> str:
    """One table of the analysis."""
    return f"results/{study}/analysis/{table}.parquet"


def results(study: str) -> str:
    """Every number of the analysis, in full precision."""
    return f"results/{study}/analysis/results.json"


def figure(study: str, name: str, suffix: str) -> str:
    """A figure (`svg`) or its plot data (`parquet`)."""
    return f"results/{study}/figures/{name}.{suffix}"


def report(study: str) -> str:
    """The self-contained report."""
    return f"results/{study}/report/report.html"


def manifest(study: str) -> str:
    """Every file of the study with its hash and the attempt that wrote it."""
    return f"results/{study}/provenance/manifest.json"


def attempts(study: str) -> str:
    """Folder of attempt records: append-only, the one thing that is no rule's output."""
    return f"results/{study}/provenance/attempts"
