rule write_manifest:
    input:
        code=code("provenance"),
        files=phases.outputs(NAME, STUDY),
    output:
        manifest=layout.manifest(NAME),
    log:
        f"logs/{NAME}/provenance.log",
    benchmark:
        f"logs/{NAME}/provenance.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("provenance"),
        study=NAME,
    message:
        "account for every file of the study"
    shell:
        "gradnoise run provenance --study {params.study} > {log} 2>&1"


rule provenance:
    input:
        layout.manifest(NAME),
