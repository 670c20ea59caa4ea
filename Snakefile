# Ablate every concept of concepts.csv from a text-to-image model and report what came of it.
#
#   snakemake --cores all                                  the embedded model, on any machine
#   snakemake --cores all --configfile config/sd14.yaml    Stable Diffusion 1.4
#   snakemake --profile local                              one machine with several GPUs
#   snakemake --profile slurm                              on a cluster: docs/running.md tells of all places
#
# Read on in workflow/rules/, one file a step, in this order.
from snakemake.utils import min_version

min_version("9.0")


configfile: f"{workflow.current_basedir}/config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/anchors.smk"
include: "workflow/rules/ablate.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "<results>/report/index.html",
        unfinished,
        "<results>/report/summary.parquet",
        "<results>/report/complete.json",  # a report with rows missing has none, so it is never up to date
