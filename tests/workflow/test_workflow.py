"""The workflow as a user runs it: one real run of two rows, what a change reruns, how mistakes are told.

And a results folder that two checkouts share: here, since that one run serves both.
"""

import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from tests.workflow.conftest import CAT, HEADER, INK, SMALL

pytestmark = pytest.mark.workflow
REPORT = {"aggregate_scores": 1, "render_report": 1}
GPU_RULES = {"generate_anchors", "ablate_concept", "sample_base", "sample_ablated", "score_concept"}
ROW = {"ablate_concept": 1, "sample_ablated": 1, "score_concept": 1, **REPORT}


@pytest.fixture
def plan(finished):
    """`plan(table)` gives the jobs that a run of `table` would start after the run of CAT and INK."""

    def count(table: str) -> dict[str, int]:
        finished.write(table)
        return finished.jobs("small.yaml")

    yield count
    finished.write(HEADER + CAT + INK)


def test_a_run_makes_the_report_of_every_row(finished):
    report = finished.folder / "results" / "report"
    for name in ("scores", "summary"):
        table = pq.read_table(report / f"{name}.parquet")
        assert set(table["concept"].to_pylist()) == {"cat", "ink"}
        assert len((report / f"{name}.csv").read_text().splitlines()) == len(table) + 1
    page = (report / "index.html").read_text()
    assert "pouting cat" in page and "ink" in page
    said = (finished.folder / "run.txt").read_text()
    assert "results/report/index.html" in said and "2 concepts: 0 finished, 2 to do (cat, ink)" in said


def test_gpu_jobs_side_by_side_have_a_device_each(finished):
    """`snakemake --profile local`, on two GPUs that are made up."""
    logs = {path: path.read_text() for path in (finished.folder / "results" / "logs").rglob("*.log")}
    rules = {path: path.parent.name if path.parent.name != "logs" else path.stem for path in logs}
    claims = {path: re.findall(r"GPU (\S+) of 5, 7$", text, re.MULTILINE) for path, text in logs.items()}
    assert set(rules.values()) == {*GPU_RULES, "write_prompts", *REPORT}
    for path, devices in claims.items():
        assert len(devices) == (rules[path] in GPU_RULES), path
    # 7 comes after 5, so it is only ever taken while another job has 5.
    assert {device for devices in claims.values() for device in devices} == {"5", "7"}
    assert not any("waiting" in text for text in logs.values())  # the profile's limit kept a third job back


def test_running_again_does_nothing(finished):
    done = finished.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout, done.stdout


def test_a_new_row_runs_its_own_jobs_and_no_work_that_exists(plan):
    new = "new,object,grinning cat,cat,weary cat,\n"
    assert plan(HEADER + CAT + INK + new) == {"sample_base": 1, **ROW}


def test_an_edited_row_reruns_alone(plan):
    assert plan(HEADER + CAT.replace(",\n", ",3\n") + INK) == ROW


def test_order_comments_and_blank_lines_rerun_nothing(plan):
    assert plan("# A comment.\n" + HEADER + "\n" + INK + "# Another.\n" + CAT) == {}


@pytest.mark.parametrize("rest", ["", "# " + INK], ids=["deleted", "commented out"])
def test_a_row_less_makes_the_report_again_and_nothing_else(plan, rest):
    assert plan(HEADER + CAT + rest) == REPORT


def test_swapping_target_and_anchor_reruns_the_row(plan):
    jobs = plan(HEADER + CAT.replace("pouting cat,cat", "cat,pouting cat") + INK)
    base = jobs.pop("sample_base", 0)
    assert jobs == {"write_prompts": 1, "generate_anchors": 1, **ROW} and base <= 3


def test_another_checkout_with_these_results_reruns_nothing_and_runs_a_row_of_its_own(
    finished, make_checkout
):
    other = make_checkout()  # it knows nothing of how the results came about
    (other.folder / "results").symlink_to(finished.folder / "results")
    other.write(HEADER + CAT + INK)
    assert other.jobs("small.yaml") == {}
    other.write(HEADER + CAT + INK + "new,object,grinning cat,cat,weary cat,\n")
    assert other.jobs("small.yaml") == {"sample_base": 1, **ROW}


def test_a_model_ablated_in_place_makes_all_that_it_draws_anew(finished, make_checkout):
    other = make_checkout()
    (other.folder / "results").symlink_to(finished.folder / "results")
    (other.folder / "models").unlink()
    shutil.copytree(finished.folder / "models", other.folder / "models")
    other.write(HEADER + CAT + INK)
    assert other.jobs("small.yaml") == {}, "a copy of the model is the same model"
    (weights,) = (other.folder / "models" / "pipeline" / "unet").glob("*.safetensors")
    size, tensors = weights.stat().st_size, load_file(weights)
    ablated = [name for name in tensors if name.startswith("mid_block") and "attn2.to_k" in name]
    assert ablated
    save_file({name: tensors[name] * (name not in ablated) for name in tensors}, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    drawn = {"generate_anchors": 2, "sample_base": 5, "sample_ablated": 2}
    assert other.jobs("small.yaml") == {"ablate_concept": 2, "score_concept": 2, **drawn, **REPORT}


def test_a_touched_script_reruns_nothing(plan, finished):
    for script in (finished.folder / "workflow" / "scripts").glob("*.py"):
        script.touch()
    assert plan(HEADER + CAT + INK) == {}


@pytest.fixture(scope="module")
def second(finished, make_checkout):
    """Another checkout, whose config names the first one's results by their absolute path."""
    checkout = make_checkout()
    own = {**SMALL, "results": str(finished.folder / "results")}
    (checkout.folder / "small.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    yield checkout
    checkout.write(HEADER + CAT + INK)  # the report as the first one made it
    done = checkout.snakemake("--cores", "1", "--configfile", "small.yaml", "--forcerun", "aggregate_scores")
    assert done.returncode == 0, done.stdout


def contents(folder):
    """Each stage's files with their times."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in found if path.relative_to(folder).parts[0] != "report"}


def test_the_second_checkout_reruns_nothing(finished, second):
    before = contents(finished.folder / "results")
    second.write(HEADER + CAT + INK)
    assert set(second.jobs("small.yaml")) <= set(REPORT)
    done = second.snakemake("--cores", "2", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    assert contents(finished.folder / "results") == before
    assert not (second.folder / "results").exists()


def test_a_row_of_its_own_is_all_that_it_adds(finished, second):
    second.write(HEADER + CAT + "new,object,grinning cat,cat,weary cat,\n")
    jobs = second.jobs("small.yaml")
    assert {rule for rule in jobs if rule not in REPORT} == {
        "ablate_concept",
        "sample_ablated",
        "sample_base",
        "score_concept",
    }
    assert jobs["ablate_concept"] == 1 and jobs["sample_base"] == 1


def test_the_report_of_another_table_is_noticed_and_made_again_when_asked(finished, second):
    second.write(HEADER + CAT)
    told = second.snakemake("--dry-run", "--configfile", "small.yaml")
    assert told.returncode == 0 and "holds the report of another table" in told.stdout
    summary = finished.folder / "results" / "report" / "summary.csv"
    assert '"ink"' in summary.read_text()
    done = second.snakemake("--cores", "1", "--configfile", "small.yaml", "--forcerun", "aggregate_scores")
    assert done.returncode == 0, done.stdout
    assert '"ink"' not in summary.read_text() and '"cat"' in summary.read_text()
    again = second.snakemake("--dry-run", "--configfile", "small.yaml")
    assert "holds the report of another table" not in again.stdout and "Nothing to be done" in again.stdout


@pytest.fixture(scope="module")
def broken(make_checkout):
    """`broken(content, config)` gives what Snakemake says of a table, and of a config, that it must refuse."""
    checkout = make_checkout()

    def run(content: bytes, config: dict | None = None) -> str:
        (checkout.folder / "concepts.csv").write_bytes(content)
        own = yaml.safe_load((checkout.folder / "small.yaml").read_text())
        (checkout.folder / "own.yaml").write_text(yaml.safe_dump({**own, **(config or {})}))
        done = checkout.snakemake("--cores", "1", "--configfile", "own.yaml")
        assert done.returncode != 0 and "Traceback" not in done.stdout, done.stdout
        assert not (checkout.folder / "results").exists()
        return done.stdout

    return run


def test_one_message_lists_every_mistake_of_the_table(broken):
    table = """concept,kind,target,anchor,neigbors,neighbors,steps
a,styel,ink,picture,,neon,
b,object,,cat,,weary cat,
b,object,owl,bird,,duck,
c,object,rocket,vehicle,,bus;rocket,
d,object,apple,fruit,,pear,many
"""
    said = broken(table.encode())
    assert said.count("concepts.csv: 6 errors") == 1
    for line, *parts in (
        (1, "'neigbors'", "did you mean 'neighbors'?", "allowed: concept, kind, target, anchor, neighbors"),
        (2, "column 'kind'", "'styel' is not one of style, object", "did you mean 'style'?"),
        (3, "column 'target'", "is empty", "allowed"),
        (4, "column 'concept'", "'b' is the name of line 3", "allowed"),
        (5, "column 'neighbors'", "'rocket' is the target", "allowed"),
        (6, "column 'steps'", "'many' is not a whole number", "allowed: a whole number from 1"),
    ):
        (message,) = [text for text in said.splitlines() if f"concepts.csv:{line}:" in text]
        assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "concepts.csv:1: has no header line"),
        (
            (HEADER + CAT + "caf\xe9,object,owl,bird,duck,\n").encode("latin-1"),
            "concepts.csv:3: byte 0xe9 is not UTF-8",
        ),
    ],
    ids=["empty", "latin-1"],
)
def test_a_file_that_is_no_table_is_refused_plainly(broken, content, message):
    said = broken(content)
    assert message in said and "allowed" in said


def test_one_message_lists_every_mistake_of_the_config(broken):
    said = broken((HEADER + CAT).encode(), {"trainig": {"steps": 2}, "evaluation": {"seed": -1}})
    assert "2 errors" in said
    assert "trainig: unknown key (did you mean 'training'?)" in said
    assert "evaluation.seed: -1 must be at least 0" in said
