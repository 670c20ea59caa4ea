# The anchors' prompts.
# Reads a prompt file (config/prompts/), writes prompts/{key}.json.
# Steps: fill the file's templates with the anchor and the slots; leave out what doesn't hold the anchor.


rule write_prompts:
    """Make the prompts of one anchor from its prompt file."""
    output:
        "<results>/prompts/{key}.json",
    log:
        "<logs>/write_prompts/{key}.log",
    benchmark:
        "<benchmarks>/write_prompts/{key}.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.spec("write_prompts", wildcards.key),
    script:
        "../scripts/write_prompts.py"
