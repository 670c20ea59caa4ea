"""Ablate concepts from text-to-image diffusion models, measure what is gone and what else was harmed.

Everything here can be used and tested without Snakemake; the rules in `workflow/` only call it.
"""

__version__ = "0.1.0"
