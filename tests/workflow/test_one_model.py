"""A bundle in Snakemake: what a new row, another way to merge and a lost file make anew."""

import pytest
import yaml

from tests.workflow.conftest import SMALL

pytestmark = pytest.mark.workflow
HEADER = "concept,kind,target,anchor,neighbors,bundle\n"
CAT, WRY = "cat,object,pouting cat,cat,weary cat,both\n", "wry,object,wry cat,cat,weary cat,both\n"
INK, NEON = "ink,style,ink,picture,,\n", "neon,style,neon,picture,,both\n"


@pytest.fixture(scope="module")
def bundled(make_checkout):
    """A checkout with the report of a bundle of two rows and a row that is in none."""
    checkout = make_checkout()
    checkout.write(HEADER + CAT + WRY + INK)
    checkout.prepare(HEADER + CAT + WRY + INK, but=())
    done = checkout.snakemake("--cores", "1", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    assert "Bundle both: " in done.stdout, "the terminal says how it came out"
    return checkout


def test_the_report_is_whole(bundled):
    assert bundled.jobs("small.yaml") == {}
    results = bundled.folder / "results"
    assert len(list(results.glob("bundles/both.*/delta.safetensors"))) == 1
    assert (results / "report" / "bundles.csv").read_text().count("\n") == 3
    assert "Bundles: one model without" in (results / "report" / "index.html").read_text(encoding="utf-8")


def test_a_new_row_of_a_bundle_trains_itself_alone(bundled):
    bundled.write(HEADER + CAT + WRY + INK + NEON)
    jobs = bundled.jobs("small.yaml")
    bundled.write(HEADER + CAT + WRY + INK)
    # Its own pictures and scores, and those of the three rows under the new bundle, which also draws the neutral prompts.
    counted = ("ablate_concept", "merge_deltas", "sample_ablated", "score_concept", "score_general")
    assert tuple(jobs[rule] for rule in counted) == (1, 1, 5, 4, 1)
    assert jobs["aggregate_bundles"] == jobs["render_report"] == 1


def test_another_way_to_merge_trains_nothing(bundled):
    (bundled.folder / "sum.yaml").write_text(
        yaml.safe_dump({**SMALL, "bundles": {**SMALL["bundles"], "how": "sum"}}), encoding="utf-8"
    )
    jobs = bundled.jobs("sum.yaml")
    assert jobs["merge_deltas"] == 1 and jobs["sample_ablated"] == 3
    assert not jobs.keys() & {"ablate_concept", "generate_anchors", "sample_base"}


def test_a_trained_bundle_reads_no_delta_and_its_repair_comes_after(bundled):
    own = {"how": "sequential", "repair": True, "training": {"preserve": "none"}}
    (bundled.folder / "trained.yaml").write_text(
        yaml.safe_dump({**SMALL, "bundles": {**SMALL["bundles"], **own}}), encoding="utf-8"
    )
    jobs = bundled.jobs("trained.yaml")
    assert jobs["train_bundle"] == jobs["repair_bundle"] == 1 and "merge_deltas" not in jobs
    done = bundled.snakemake("--cores", "1", "--configfile", "trained.yaml")
    assert done.returncode == 0, done.stdout
    assert len(list(bundled.folder.glob("results/repaired/both.*/repair.parquet"))) == 1
    assert "sequential, repaired" in (bundled.folder / "results/report/bundles.csv").read_text()
    assert bundled.jobs("trained.yaml") == {}


def test_a_lost_delta_is_merged_again(bundled):
    (delta,) = bundled.folder.glob("results/bundles/*/delta.safetensors")
    content = delta.read_bytes()
    delta.unlink()
    jobs = bundled.jobs("small.yaml")
    delta.write_bytes(content)
    assert jobs["merge_deltas"] == 1 and "ablate_concept" not in jobs


def test_a_bundle_of_words_alone_is_made_without_a_delta(bundled):
    (bundled.folder / "words.yaml").write_text(
        yaml.safe_dump({**SMALL, "bundles": {**SMALL["bundles"], "how": "uce", "judge": False}}),
        encoding="utf-8",
    )
    before = set(bundled.folder.glob("results/bundles/both.*/delta.safetensors"))
    assert bundled.jobs("words.yaml")["merge_deltas"] == 1
    done = bundled.snakemake("--cores", "1", "--configfile", "words.yaml")
    assert done.returncode == 0, done.stdout
    assert len(set(bundled.folder.glob("results/bundles/both.*/delta.safetensors")) - before) == 1
