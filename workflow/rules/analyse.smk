rule analyse_plan:
    input:
        code=code("analyse"),
        scores=layout.scores(NAME),
        exposure=layout.exposure(NAME),
        registration=phases.registration(STUDY),
    output:
        **{table: layout.analysis(NAME, table) for table in layout.ANALYSIS_TABLES},
        results=layout.results(NAME),
    log:
        f"logs/{NAME}/analyse.log",
    benchmark:
        f"logs/{NAME}/analyse.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("analyse"),
        # Not the file: a comment in it decides nothing.
        plan=PLAN.key,
        study=NAME,
        design=settings_text(phases.design(STUDY)),
    message:
        "carry out the tests of the plan"
    shell:
        "gradnoise run analyse --study {params.study} > {log} 2>&1"


rule analyse:
    input:
        phases.analyse_outputs(NAME),
