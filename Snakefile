# Ablate every concept in concepts.csv from a text-to-image model, and report what was removed and what was harmed.
#
#   snakemake --cores all                                  the embedded model, on any machine
#   snakemake --cores all --configfile config/sd14.yaml    Stable Diffusion 1.4
#   snakemake --profile local                              one machine with several GPUs
#   snakemake --profile slurm                              a SLURM cluster; docs/running.md covers all of these
#
# The rules are in workflow/rules/, one file a step, in this order.
from snakemake.utils import min_version

min_version("9.0")


configfile: f"{workflow.current_basedir}/config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/anchors.smk"
include: "workflow/rules/ablate.smk"
include: "workflow/rules/bundles.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/interference.smk"
include: "workflow/rules/attacks.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        "<results>/report/index.html",
        unfinished,
        "<results>/report/summary.parquet",
        "<results>/report/complete.json",  # missing if the report lacks rows, so such a report is made again
