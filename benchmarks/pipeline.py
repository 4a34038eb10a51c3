"""Where the time of the quick study goes: rebuilds it by force and reads the attempts' records.

    python benchmarks/pipeline.py

Run it in a clone, from its root, with the environment on. Prints a table in Markdown. A forced rebuild leaves
the results' bytes as they are and adds attempts to results/quick/provenance.
"""

import json
import os
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from gradnoise import phases
from gradnoise.base import layout

CORES = 2
# What a phase imports only when it is at work.
LATER = {"analyse": ["pandas", "pingouin", "sklearn.isotonic", "statsmodels.regression.mixed_linear_model"]}


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_up(modules: list[str]) -> float:
    """CPU seconds of a Python that imports the modules and ends; the least of three."""
    statement = f"import {', '.join(modules)}"
    least = float("inf")
    for _ in range(3):
        before = cpu_of_children()
        subprocess.run([sys.executable, "-c", statement], check=True)
        least = min(least, cpu_of_children() - before)
    return least


def waiting(records: list[dict[str, object]], ended: float) -> float:
    """Core-seconds between the first job's start and the last one's end in which nothing was ready to run."""
    marks = []
    for record in records:
        begin, end = (datetime.fromisoformat(str(record[key])).timestamp() for key in ("start", "end"))
        marks += [(begin, 1), (min(end, ended), -1)]
    idle, running, last = 0.0, 0, min(marks)[0]
    for moment, change in sorted(marks):
        idle += (CORES - min(CORES, running)) * (moment - last)
        running, last = running + change, moment
    return idle


def main() -> None:
    attempts = Path(layout.attempts("quick"))
    before = set(attempts.glob("*.json"))
    used, began = cpu_of_children(), time.time()
    command = ["snakemake", "--forceall", "--cores", str(CORES), "--config", "study=quick", "--quiet", "all"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wall, total = time.time() - began, cpu_of_children() - used
    new = set(attempts.glob("*.json")) - before
    records = [json.loads(path.read_bytes()) for path in sorted(new)]
    # The manifest is the one job without a record.
    counts = {phase: sum(record["phase"] == phase for record in records) for phase in phases.MODULES}
    counts["provenance"] = 1
    # A record counts from after its command's imports.
    first = {phase: start_up(["gradnoise.cli", module]) for phase, module in phases.MODULES.items()}
    every = first | {
        phase: start_up(["gradnoise.cli", phases.MODULES[phase], *later]) for phase, later in LATER.items()
    }
    starts = sum(counts[phase] * every[phase] for phase in phases.MODULES)
    work = sum(record["cpu_seconds"] for record in records)
    engine = total - work - sum(counts[phase] * first[phase] for phase in phases.MODULES)
    idle = waiting(records, time.time())
    memory = max(record["peak_memory_bytes"] for record in records) / 1e6
    rows = {
        "wall time": f"{wall:.0f} s",
        "jobs": f"{sum(counts.values())}",
        "CPU seconds in all": f"{total:.0f}",
        "of these Snakemake itself": f"{engine:.1f} ({engine / total:.1%})",
        "of these the jobs' start-up (imports)": f"{starts:.1f} ({starts / total:.1%})",
        "Snakemake and start-up together": f"{(engine + starts) / total:.1%}",
        "cores idle because nothing was ready": f"{idle:.0f} core-seconds ({idle / (CORES * wall):.1%})",
        "largest peak memory of a job": f"{memory:.0f} MB",
    }
    print("| what | measured |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
