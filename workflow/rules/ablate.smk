# The ablation itself.
# Reads anchors/{key}.parquet, writes concepts/{key}/delta.safetensors and the record of its training.
# Steps: train the chosen parameters until the target's prompt is predicted as the anchor's; save the changed weights.


rule ablate_concept:
    """Remove one concept from the model."""
    input:
        anchors=lambda wildcards: plan.upstream("ablate_concept", wildcards.key, "generate_anchors"),
    output:
        delta="<results>/concepts/{key}/delta.safetensors",
        training="<results>/concepts/{key}/training.parquet",
    log:
        "<logs>/ablate_concept/{key}.log",
    benchmark:
        "<benchmarks>/ablate_concept/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
    params:
        spec=lambda wildcards: plan.spec("ablate_concept", wildcards.key),
    script:
        "../scripts/ablate_concept.py"
