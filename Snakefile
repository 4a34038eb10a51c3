# From data to figures. The path grammar of results/ (written once in src/gradnoise/base/layout.py):
#
#   results/<study>/data/plays.parquet                                  prepare
#   results/<study>/runs/<block>/<cell>/<seeds>.<table>.parquet         train     one job: the seeds of a cell
#       <cell>  b016-lr0.002      batch and learning rate; or the name of an arm, such as reweight-b16
#       <seeds> s00-04            indices of the plan's derived seeds
#       <table> scores | trajectory | noise_events | noise_parts
#   results/<study>/noise/exposure.parquet, exposure_parts.parquet      measure
#   results/<study>/scores/scores.parquet                               measure
#   results/<study>/analysis/<table>.parquet, results.json              analyse
#   results/<study>/figures/<figure>.svg, <figure>.parquet              draw
#   results/<study>/report/report.html                                  report
#   results/<study>/provenance/manifest.json                            provenance
#   results/<study>/provenance/attempts/*.json                          every job, append-only; no rule's output
#
# <study> is `study:` of config/config.yaml; its settings are config/<study>.yaml.

from snakemake.utils import min_version

min_version("9.27")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/analyse.smk"
include: "workflow/rules/draw.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/provenance.smk"


rule all:
    default_target: True
    input:
        # Each by itself: a file that is missing in the middle is built again though the manifest is there.
        phases.outputs(NAME, STUDY),
        layout.manifest(NAME),
