"""Stands in for Slurm's commands: `stub_slurm.py COMMAND ARGUMENTS...`, with its state in $STUB_SLURM.

A submitted job's arguments are kept in <id>.json, and the job really runs, in the background, with its output
where --output says. It runs wherever Python does, and shows what Snakemake asks of Slurm. What a real Slurm
makes of that (limits, accounting, requeues) no test of this repository covers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "squeue", "scontrol", "sinfo", "scancel")


def sbatch(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    parser.add_argument("--wrap")
    known, _ = parser.parse_known_args(arguments)
    number = str(os.getpid())
    state = Path(os.environ["STUB_SLURM"], number)
    state.with_suffix(".json").write_text(json.dumps(arguments))
    with Path(known.output.replace("%j", number)).open("w") as log:
        program = f"({known.wrap}) && echo COMPLETED > {state}.end || echo FAILED > {state}.end"
        environment = os.environ | {"SLURM_JOB_ID": number}
        subprocess.Popen(
            ["sh", "-c", program], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    print(number)


def srun(arguments: list[str]) -> None:
    command = arguments[next(i for i, word in enumerate(arguments) if not word.startswith("-")) :]
    raise SystemExit(subprocess.run(command).returncode)


def sacct(arguments: list[str]) -> None:
    if "--format=JobIdRaw,State" not in arguments:
        return  # asked for the user's account: there is none
    for job in Path(os.environ["STUB_SLURM"]).glob("*.json"):
        end = job.with_suffix(".end")
        print(f"{job.stem}|{(end.read_text().strip() if end.exists() else '') or 'RUNNING'}")


if __name__ == "__main__":
    command, arguments = sys.argv[1], sys.argv[2:]
    if command in ("sbatch", "srun", "sacct"):
        globals()[command](arguments)
    elif command == "scontrol":
        print("MinJobAge = 3600 sec")
