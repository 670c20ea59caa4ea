"""How a job of the workflow starts: its script's part, and the process that imports torch once for all jobs of a run."""
