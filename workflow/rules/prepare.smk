rule prepare_corpus:
    input:
        code=code("prepare"),
    output:
        plays=layout.plays("{study}"),
    log:
        "logs/{study}/prepare.log",
    benchmark:
        "logs/{study}/prepare.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("prepare"),
        settings=settings_text(phases.prepare_settings(STUDY)),
    message:
        "prepare the corpus of {wildcards.study}"
    shell:
        "gradnoise run prepare --study {wildcards.study} > {log} 2>&1"


rule prepare:
    input:
        phases.prepare_outputs(NAME, STUDY),
