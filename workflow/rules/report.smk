# The tables of all rows and the page that shows them.
# Reads every row's scores and pictures, writes report/scores, report/summary (Parquet and CSV) and report/index.html.
# report/complete.json is the mark of a whole report: what `onerror` makes of the rows that are finished is without it.
# Rows that were finished before this run aren't inputs, so that planning stays quick; the spec names all rows' files.
# In a remote storage all rows are inputs, so that their files are fetched.


rule aggregate_scores:
    """Put all rows' scores into one long and one wide table."""
    input:
        plan.pending_files() if stored else unfinished,
    output:
        scores="<results>/report/scores.parquet",
        scores_csv="<results>/report/scores.csv",
        summary="<results>/report/summary.parquet",
        summary_csv="<results>/report/summary.csv",
        complete="<results>/report/complete.json",
    log:
        "<logs>/aggregate_scores.log",
    benchmark:
        "<benchmarks>/aggregate_scores.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # as text, braces in it would be wildcards
    script:
        "../scripts/aggregate_scores.py"


rule render_report:
    """Make the page: a sortable table, then pictures before and after for every row."""
    input:
        scores="<results>/report/scores.parquet",
        summary="<results>/report/summary.parquet",
        rows=plan.pending_files() if stored else [],
    output:
        "<results>/report/index.html",
    log:
        "<logs>/render_report.log",
    benchmark:
        "<benchmarks>/render_report.tsv"
    conda:
        "../envs/python.yaml"
    params:
        spec=lambda wildcards: plan.report_spec(),  # as text, braces in it would be wildcards
    script:
        "../scripts/render_report.py"
