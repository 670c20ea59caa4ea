"""Any rule whose work the plan names: its stage's function gets the spec, and the rule's files and options by name."""

import sys

from concept_ablation.jobs.job import describe, run
from concept_ablation.jobs.warm import hand_over

job = describe(snakemake)
code = hand_over(job)
if code is None:  # no warm process: this one does the work
    run(job)
else:
    sys.exit(code)
