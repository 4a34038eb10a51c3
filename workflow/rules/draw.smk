rule draw_figures:
    input:
        code=code("draw"),
        analysis=phases.analyse_outputs(NAME),
    output:
        figures=[captioned(spec) for spec in SPECS],
        data=[layout.figure(NAME, spec.name, "parquet") for spec in SPECS],
    log:
        f"logs/{NAME}/draw.log",
    benchmark:
        f"logs/{NAME}/draw.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("draw"),
        study=NAME,
        # What the captions of Snakemake's report print.
        label=PLAN.study.label,
        target_loss=PLAN.matching.target,
        outcome=PLAN.descriptive.outcome,
        predictor=PLAN.descriptive.predictor,
        rivals=", ".join(PLAN.descriptive.rivals),
    message:
        "draw the figures"
    shell:
        "gradnoise run draw --study {params.study} > {log} 2>&1"


rule draw:
    input:
        phases.draw_outputs(NAME),
