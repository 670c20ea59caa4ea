# The ablation itself.
# Reads anchors/{key}.parquet, writes concepts/{key}/delta.safetensors and the records of its steps and of the looks at its strength.
# Steps: train the chosen parameters so that the model predicts for the target's prompt what it predicts for the anchor's;
# save the changed weights. A row with a delta made elsewhere has it checked and converted to deltas/{key}.safetensors instead.


rule ablate_concept:
    """Remove one concept from the model."""
    input:
        anchors=lambda wildcards: plan.upstream("ablate_concept", wildcards.key, "anchors"),
        shared=lambda wildcards: plan.upstream("ablate_concept", wildcards.key, "shared"),
    output:
        delta=file_of("ablate_concept", "delta"),
        training=file_of("ablate_concept", "training"),
        strength=file_of("ablate_concept", "strength"),
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
        checkpoint_steps=config["runtime"]["checkpoint_steps"],
    params:
        spec=lambda wildcards: plan.spec("ablate_concept", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule import_delta:
    """Convert a delta that was made elsewhere, in any of the published formats."""
    output:
        delta=file_of("import_delta", "delta"),
    log:
        "<logs>/import_delta/{key}.log",
    benchmark:
        "<benchmarks>/import_delta/{key}.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.spec("import_delta", wildcards.key),
    script:
        "../scripts/run_stage.py"
