def captioned(spec):
    """A figure with its caption for Snakemake's own report."""
    return report(
        layout.figure(NAME, spec.name, "svg"),
        caption=f"../report/{spec.name}.rst",
        category="Figures",
        labels={"figure": str(spec.number), "title": spec.title},
    )


rule draw_figures:
    input:
        code=code("draw"),
        analysis=phases.analyse_outputs(NAME),
    output:
        figures=[captioned(spec) for spec in SPECS],
        data=[layout.figure(NAME, spec.name, "parquet") for spec in SPECS],
    params:
        study=NAME,
        # What the captions of Snakemake's report print.
        label=PLAN.study.label,
        target_loss=PLAN.matching.target,
    log:
        f"logs/{NAME}/draw.log",
    benchmark:
        f"logs/{NAME}/draw.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    message:
        "draw the figures"
    shell:
        "gradnoise run draw --study {params.study} > {log} 2>&1"


rule draw:
    input:
        phases.draw_outputs(NAME),
