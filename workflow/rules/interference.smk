# What the removal of one row's concept does to the concepts of other rows.
# `measure_interference` reads concepts/{key}/delta.safetensors (or deltas/{key}.safetensors) and base/{key}.parquet of each victim, and
# samples/{key}.parquet where the row draws a victim itself. It writes interference/{key}.parquet and interference/{key}.images.parquet.
# Steps: draw each victim's base pictures once more with the row's model, and compare them seed by seed.
# `aggregate_interference` puts all rows' tables into one, report/interference, and adjusts the p-values for their number.


rule measure_interference:
    """Measure one row's model on targets and neighbors of other rows."""
    input:
        delta=lambda wildcards: plan.upstream("measure_interference", wildcards.key, "delta"),
        base=lambda wildcards: plan.upstream("measure_interference", wildcards.key, "base"),
        samples=lambda wildcards: plan.upstream("measure_interference", wildcards.key, "samples"),
    output:
        scores=file_of("measure_interference", "scores"),
        images=file_of("measure_interference", "images"),
    log:
        "<logs>/measure_interference/{key}.log",
    benchmark:
        "<benchmarks>/measure_interference/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("measure_interference", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule aggregate_interference:
    """Collect who harms whom in one table, with p-values adjusted for all of it."""
    input:
        plan.pending_files() if stored else sorted(measured),
    output:
        interference="<results>/report/interference.parquet",
        interference_csv="<results>/report/interference.csv",
    log:
        "<logs>/aggregate_interference.log",
    benchmark:
        "<benchmarks>/aggregate_interference.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # a function, since Snakemake takes braces in a text for wildcards
    script:
        "../scripts/aggregate_interference.py"
