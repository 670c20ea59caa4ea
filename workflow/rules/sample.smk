# The pictures that are judged. The unchanged and the ablated model draw the same prompts with the same seeds.
# Reads concepts/{key}/delta.safetensors (or deltas/{key}.safetensors), writes base/{key}.parquet (a probe, shared by rows) and
# samples/{key}.parquet (a row). A probe that a store which is there begins with takes its first pictures from it.


rule sample_base:
    """Draw one probe with the unchanged model."""
    input:
        start=lambda wildcards: plan.start(wildcards.key),
    output:
        images=file_of("sample_base", "images"),
    log:
        "<logs>/sample_base/{key}.log",
    benchmark:
        "<benchmarks>/sample_base/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("sample_base", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule sample_ablated:
    """Draw all probes of one row with the ablated model, with `evaluation.until` as many pictures as are needed beside the unchanged one's."""
    input:
        delta=lambda wildcards: plan.upstream("sample_ablated", wildcards.key, "delta"),
        base=lambda wildcards: plan.upstream("sample_ablated", wildcards.key, "base"),
    output:
        images=file_of("sample_ablated", "images"),
    log:
        "<logs>/sample_ablated/{key}.log",
    benchmark:
        "<benchmarks>/sample_ablated/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("sample_ablated", wildcards.key),
    script:
        "../scripts/run_stage.py"
