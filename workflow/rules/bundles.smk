# One model without the concepts of several rows.
# Reads the rows' deltas, concepts/{key}/delta.safetensors (or deltas/{key}.safetensors), their prompts, prompts/{key}.json (or
# searches/{key}.json), and their anchors' pictures, anchors/{key}.parquet, as far as the bundle's way needs them.
# Steps: `merge_deltas` makes bundles/{key}/delta.safetensors of the rows' deltas, or `train_bundle` trains
# trained/{key}/delta.safetensors on the pictures; `repair_bundle`, where it is asked for, trains what came back or was lost once
# more, repaired/{key}/delta.safetensors. The rows' probes are drawn and scored once more under the bundle's delta, by sample_ablated
# and score_concept, and neutral prompts, by score_general; `aggregate_bundles` collects these scores in report/bundles.
# `share_prompts` writes shared/{key}.json, where the rows of a bundle preserve the same prompts when they are trained.


rule share_prompts:
    """Write the prompts that all rows of a bundle preserve."""
    input:
        anchors=lambda wildcards: plan.upstream("share_prompts", wildcards.key, "prompts"),
    output:
        prompts=file_of("share_prompts", "prompts"),
    log:
        "<logs>/share_prompts/{key}.log",
    benchmark:
        "<benchmarks>/share_prompts/{key}.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.spec("share_prompts", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule merge_deltas:
    """Merge the deltas of a bundle's rows into one."""
    input:
        deltas=lambda wildcards: plan.upstream("merge_deltas", wildcards.key, "deltas"),
        prompts=lambda wildcards: plan.upstream("merge_deltas", wildcards.key, "prompts"),
    output:
        delta=file_of("merge_deltas", "delta"),
    log:
        "<logs>/merge_deltas/{key}.log",
    benchmark:
        "<benchmarks>/merge_deltas/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
    params:
        spec=lambda wildcards: plan.spec("merge_deltas", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule train_bundle:
    """Train one model without the concepts of a bundle's rows."""
    input:
        anchors=lambda wildcards: plan.upstream("train_bundle", wildcards.key, "anchors"),
        prompts=lambda wildcards: plan.upstream("train_bundle", wildcards.key, "prompts"),
    output:
        delta=file_of("train_bundle", "delta"),
        training=file_of("train_bundle", "training"),
    log:
        "<logs>/train_bundle/{key}.log",
    benchmark:
        "<benchmarks>/train_bundle/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        checkpoint_steps=config["runtime"]["checkpoint_steps"],
    params:
        spec=lambda wildcards: plan.spec("train_bundle", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule repair_bundle:
    """Train the rows that fail under their bundle's model once more."""
    input:
        source=lambda wildcards: plan.upstream("repair_bundle", wildcards.key, "source"),
        anchors=lambda wildcards: plan.upstream("repair_bundle", wildcards.key, "anchors"),
        prompts=lambda wildcards: plan.upstream("repair_bundle", wildcards.key, "prompts"),
    output:
        delta=file_of("repair_bundle", "delta"),
        repair=file_of("repair_bundle", "repair"),
    log:
        "<logs>/repair_bundle/{key}.log",
    benchmark:
        "<benchmarks>/repair_bundle/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("repair_bundle", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule score_general:
    """Score what a bundle's model makes of prompts that no row names."""
    input:
        samples=lambda wildcards: plan.upstream("score_general", wildcards.key, "samples"),
        base=lambda wildcards: plan.upstream("score_general", wildcards.key, "base"),
        other=lambda wildcards: plan.upstream("score_general", wildcards.key, "other"),
    output:
        scores=file_of("score_general", "scores"),
    log:
        "<logs>/score_general/{key}.log",
    benchmark:
        "<benchmarks>/score_general/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
    params:
        spec=lambda wildcards: plan.spec("score_general", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule aggregate_bundles:
    """Collect how the rows of all bundles came out under their bundle's model."""
    input:
        summary="<results>/report/summary.parquet",
        rows=plan.pending_files() if stored else [],
    output:
        bundles="<results>/report/bundles.parquet",
        bundles_csv="<results>/report/bundles.csv",
    log:
        "<logs>/aggregate_bundles.log",
    benchmark:
        "<benchmarks>/aggregate_bundles.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # a function, since Snakemake takes braces in a text for wildcards
    script:
        "../scripts/aggregate_bundles.py"
