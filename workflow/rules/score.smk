# The scores of one row.
# Reads samples/{key}.parquet and base/{key}.parquet of each probe, writes scores/{key}.parquet and images/{key}.parquet, a line a picture.
# Steps: CLIP scores and accuracy, recognition and the distance to the base model's pictures, each with its interval.


rule score_concept:
    """Score one row: whether the target is gone and the neighbors are intact."""
    input:
        samples=lambda wildcards: plan.upstream("score_concept", wildcards.key, "samples"),
        base=lambda wildcards: plan.upstream("score_concept", wildcards.key, "base"),
    output:
        scores=file_of("score_concept", "scores"),
        images=file_of("score_concept", "images"),
    log:
        "<logs>/score_concept/{key}.log",
    benchmark:
        "<benchmarks>/score_concept/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
    params:
        spec=lambda wildcards: plan.spec("score_concept", wildcards.key),
    script:
        "../scripts/run_stage.py"
