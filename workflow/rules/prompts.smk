# The anchors' prompts.
# Reads a prompt file (config/prompts/) or asks a language model, writes prompts/{key}.json or searches/{key}.json.
# Steps: fill the file's templates with the anchor and the slots; for objects leave out prompts without the anchor. For a
# memorized picture: try prompts until enough are found that reproduce it, and enough that don't.


rule write_prompts:
    """Make the prompts of one anchor."""
    output:
        prompts=file_of("write_prompts", "prompts"),
    log:
        "<logs>/write_prompts/{key}.log",
    benchmark:
        "<benchmarks>/write_prompts/{key}.tsv"
    conda:
        "../envs/python.yaml"
    resources:
        gpu=lambda wildcards: int("language_model" in plan.specs["write_prompts"][wildcards.key]["source"]),
        device=config["runtime"]["device"],
        attempts=config["runtime"]["prompt_requests"],
        timeout=config["runtime"]["prompt_timeout"],
        key_variable=config["runtime"]["prompt_key_variable"] or "",
    params:
        spec=lambda wildcards: plan.spec("write_prompts", wildcards.key),
    script:
        "../scripts/run_stage.py"


rule search_prompts:
    """Find prompts that reproduce a memorized picture, and prompts of its content that don't."""
    input:
        candidates=lambda wildcards: plan.upstream("search_prompts", wildcards.key, "candidates_from"),
    output:
        prompts=file_of("search_prompts", "prompts"),
    log:
        text="<logs>/search_prompts/{key}.log",
        record=file_of("search_prompts", "record"),  # listed as a log, so that it is kept when too few prompts are found
    benchmark:
        "<benchmarks>/search_prompts/{key}.tsv"
    conda:
        "../envs/python.yaml"
    threads: config["runtime"]["threads"]
    resources:
        gpu=1,
        device=config["runtime"]["device"],
        batch_size=config["runtime"]["sample_batch_size"],
    params:
        spec=lambda wildcards: plan.spec("search_prompts", wildcards.key),
    script:
        "../scripts/run_stage.py"
