from gradnoise.training.settings import job_settings


def corpus_of(wildcards):
    """Text blocks read the prepared corpus, the others nothing."""
    return phases.corpus(wildcards.study, STUDY, wildcards.block)


def settings_of(wildcards):
    """What decides this job, and no other one."""
    return settings_text(job_settings(STUDY, wildcards.block, wildcards.cell, wildcards.chunk))


rule train_seeds:
    input:
        code=code("train"),
        plan=STUDY.plan,
        corpus=corpus_of,
    output:
        **{table: layout.run("{study}", "{block}", "{cell}", "{chunk}", table) for table in layout.RUN_TABLES},
    params:
        settings=settings_of,
    log:
        "logs/{study}/train/{block}/{cell}/{chunk}.log",
    benchmark:
        "logs/{study}/train/{block}/{cell}/{chunk}.benchmark.tsv"
    conda:
        "../envs/gradnoise.yaml"
    message:
        "train {wildcards.block}/{wildcards.cell}, seeds {wildcards.chunk}"
    shell:
        "gradnoise run train --study {wildcards.study} --block {wildcards.block}"
        " --cell {wildcards.cell} --seeds {wildcards.chunk} > {log} 2>&1"


rule train:
    input:
        phases.run_tables(NAME, STUDY),
