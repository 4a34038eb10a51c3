rule render_report:
    input:
        code=code("report"),
        results=layout.results(NAME),
        figures=phases.draw_outputs(NAME),
    output:
        html=layout.report(NAME),
    log:
        f"logs/{NAME}/report.log",
    benchmark:
        f"logs/{NAME}/report.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("report"),
        study=NAME,
    message:
        "render the report"
    shell:
        "gradnoise run report --study {params.study} > {log} 2>&1"


rule report_page:
    input:
        layout.report(NAME),
