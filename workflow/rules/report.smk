# The tables of all rows and the page that shows them.
# Reads every row's scores and pictures, and the jobs' benchmarks and logs; writes report/scores, report/summary and report/costs (Parquet
# and CSV), report/images (a line a picture) and report/index.html with report/figures/ (plots, grids and enlarged pictures).
# report/complete.json marks a report of all rows. The report that `onerror` makes of the finished rows doesn't have it.
# Rows that were finished before this run aren't inputs, so that planning stays quick; the spec names the files of all rows.
# In a remote storage all rows are inputs, so that Snakemake fetches their files.


rule aggregate_scores:
    """Collect all rows' scores in a long table and a wide one, the record of all pictures, and what every job cost."""
    input:
        plan.pending_files() if stored else judged,
        interference=interference,
        attacks=attacks,
    output:
        scores="<results>/report/scores.parquet",
        scores_csv="<results>/report/scores.csv",
        summary="<results>/report/summary.parquet",
        summary_csv="<results>/report/summary.csv",
        images="<results>/report/images.parquet",
        costs="<results>/report/costs.parquet",
        costs_csv="<results>/report/costs.csv",
        columns="<results>/report/columns.json",
        complete="<results>/report/complete.json",
    log:
        "<logs>/aggregate_scores.log",
    benchmark:
        "<benchmarks>/aggregate_scores.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # a function, since Snakemake takes braces in a text for wildcards
    script:
        "../scripts/aggregate_scores.py"


rule render_report:
    """Make the page, worst rows first, with pictures before and after for every row; its plots as files for papers, and large pictures in full size."""
    input:
        scores="<results>/report/scores.parquet",
        summary="<results>/report/summary.parquet",
        costs="<results>/report/costs.parquet",
        bundles=["<results>/report/bundles.parquet"] if plan.judges_bundles else [],
        interference=interference,
        attacks=attacks,
        rows=plan.pending_files() if stored else [],
    output:
        "<results>/report/index.html",
        figures=directory("<results>/report/figures"),
    log:
        "<logs>/render_report.log",
    benchmark:
        "<benchmarks>/render_report.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # a function, since Snakemake takes braces in a text for wildcards
    script:
        "../scripts/render_report.py"
