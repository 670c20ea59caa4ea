# One model without the concepts of several rows.
# `merge_deltas` reads concepts/{key}/delta.safetensors (or deltas/{key}.safetensors) and prompts/{key}.json (or searches/{key}.json) of each row of a
# bundle, writes bundles/{key}/delta.safetensors.
# Steps: encode the rows' prompts; find the weights that do to each row's tokens what its own delta does, and nothing to those that
# are preserved. Other ways to merge add the deltas up, and read no prompts. The rows' probes are drawn and scored once more under the
# merged delta, by sample_ablated and score_concept; `aggregate_bundles` collects these scores in report/bundles.


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
