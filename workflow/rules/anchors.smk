# The anchors' pictures, which the ablation trains on.
# Reads prompts/{key}.json (for a memorized picture searches/{key}.json), writes anchors/{key}.parquet.
# Steps: the unchanged model draws image i from the i-th prompt, in turn, with seed + i. Rows with the same anchor share them.


rule generate_anchors:
    """Draw the pictures of one anchor with the unchanged model."""
    input:
        prompts=lambda wildcards: plan.upstream("generate_anchors", wildcards.key, "prompts"),
    output:
        images=file_of("generate_anchors", "images"),
    log:
        "<logs>/generate_anchors/{key}.log",
    benchmark:
        "<benchmarks>/generate_anchors/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("generate_anchors", wildcards.key),
    script:
        "../scripts/run_stage.py"
