# Whether a removed concept comes back when it is asked for in another way.
# `probe_wordings` reads concepts/{key}/delta.safetensors (or deltas/{key}.safetensors) and base/{key}.parquet of the target and of the
# anchor, and writes wordings/{key}.parquet, a line for each family of prompts, and wordings/{key}.images.parquet, their pictures.
# Steps: draw each family by the unchanged model and by the row's from the same seeds, and count the pictures that show the target.
# `attack_concept` reads a delta and base/{key}.parquet of the target and of the anchor, and writes attacks/{key}.parquet, one line,
# attacks/{key}.images.parquet, and attacks/{key}.safetensors, what was learned.
# Steps: learn words or embeddings that bring the target's pictures back, and draw with them from fresh seeds.
# `aggregate_attacks` puts all rows' tables into one, report/attacks.


rule probe_wordings:
    """Ask one row's model for its target in other words: paraphrases, synonyms, misspellings, longer prompts, other languages."""
    input:
        delta=lambda wildcards: plan.upstream("probe_wordings", wildcards.key, "delta"),
        pictures=lambda wildcards: plan.upstream("probe_wordings", wildcards.key, "pictures"),
        control=lambda wildcards: plan.upstream("probe_wordings", wildcards.key, "control"),
    output:
        scores=file_of("probe_wordings", "scores"),
        images=file_of("probe_wordings", "images"),
    log:
        "<logs>/probe_wordings/{key}.log",
    benchmark:
        "<benchmarks>/probe_wordings/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("probe_wordings", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule attack_concept:
    """Learn against one row's model what brings its target back, and the same against the unchanged model as a control."""
    input:
        delta=lambda wildcards: plan.upstream("attack_concept", wildcards.key, "delta"),
        pictures=lambda wildcards: plan.upstream("attack_concept", wildcards.key, "pictures"),
        control=lambda wildcards: plan.upstream("attack_concept", wildcards.key, "control"),
    output:
        scores=file_of("attack_concept", "scores"),
        images=file_of("attack_concept", "images"),
        learned=file_of("attack_concept", "learned"),
    log:
        "<logs>/attack_concept/{key}.log",
    benchmark:
        "<benchmarks>/attack_concept/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("attack_concept", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule aggregate_attacks:
    """Collect in one table which wordings and attacks bring which target back, beside the limits of the verdict."""
    input:
        plan.pending_files() if stored else [file for file in unfinished if file not in measured],
    output:
        attacks="<results>/report/attacks.parquet",
        attacks_csv="<results>/report/attacks.csv",
    log:
        "<logs>/aggregate_attacks.log",
    benchmark:
        "<benchmarks>/aggregate_attacks.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # a function, since Snakemake takes braces in a text for wildcards
    script:
        "../scripts/aggregate_attacks.py"
