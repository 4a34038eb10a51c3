rule train_seeds:
    input:
        code=code("train"),
        corpus=corpus_of,
    output:
        **{
            table: layout.run("{study}", "{block}", "{cell}", "{chunk}", table)
            for table in layout.RUN_TABLES
        },
    log:
        "logs/{study}/train/{block}/{cell}/{chunk}.log",
    benchmark:
        "logs/{study}/train/{block}/{cell}/{chunk}.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    params:
        packages=packages("train"),
        # Not the file: a comment in it decides nothing.
        plan=PLAN.key,
        settings=settings_of,
    message:
        "train {wildcards.block}/{wildcards.cell}, seeds {wildcards.chunk}"
    shell:
        "gradnoise run train --study {wildcards.study} --block {wildcards.block}"
        " --cell {wildcards.cell} --seeds {wildcards.chunk} > {log} 2>&1"


rule train:
    input:
        phases.run_tables(NAME, STUDY),
