rule measure_exposure:
    input:
        code=code("measure"),
        runs=phases.measure_inputs(NAME, STUDY),
    output:
        exposure=layout.exposure(NAME),
        parts=layout.exposure_parts(NAME),
        scores=layout.scores(NAME),
    log:
        f"logs/{NAME}/measure.log",
    benchmark:
        f"logs/{NAME}/measure.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("measure"),
        study=NAME,
    message:
        "integrate the exposure of all runs"
    shell:
        "gradnoise run measure --study {params.study} > {log} 2>&1"


rule measure:
    input:
        phases.measure_outputs(NAME),
