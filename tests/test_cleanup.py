"""`gc`: what no row refers to goes, what a row needs stays, and nothing else is ever touched."""

import os
import random
import time
from pathlib import Path

import pytest
import yaml

from concept_ablation.__main__ import main
from concept_ablation.common.text import size_text
from concept_ablation.plan.checks import read_table
from concept_ablation.plan.cleanup import collect

ROOT = Path(__file__).parents[1]
HEADER = "concept,kind,target,anchor,neighbors,enabled\n"
ROWS = [
    "owl,object,owl,bird,duck; penguin,\n",
    "duck,object,duck,bird,owl; penguin,\n",
    "rocket,object,rocket,vehicle,bus,\n",
    "neon,style,neon,picture,ink; pixel,\n",
    "off,object,apple,fruit,banana,false\n",
]
OLD = time.time() - 3 * 24 * 3600
FOREIGN = [
    "notes.txt",
    "anchors/mine.parquet",
    "concepts/mine/delta.safetensors",
    "report/index.html",
    "report/complete.json",
    "x.0123456789ab/y",
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table(rows)` writes a table and its config, whose path it returns; results are in `tmp_path / "results"`."""
    monkeypatch.chdir(ROOT)
    made = []

    def write(rows: list[str], header: str = HEADER, **config) -> str:
        made.append(None)
        csv, own = tmp_path / f"{len(made)}.csv", tmp_path / f"{len(made)}.yaml"
        csv.write_text(header + "".join(rows))
        own.write_text(yaml.safe_dump({"concepts": str(csv), "results": str(tmp_path / "results"), **config}))
        return str(own)

    return write


def files_of(plan) -> set[Path]:
    """All that a run of a plan leaves: outputs, logs, benchmarks, checkpoints, what searches and models wrote beside."""
    results, found = Path(plan.results), {Path(file) for row in plan.rows for file in plan.files(row)}
    for key, stage in plan.stages.items():
        found |= {Path(plan.path(key)), results / "logs" / stage / f"{key}.log"}
        found |= {
            results / "benchmarks" / stage / f"{key}.tsv",
            results / "logs/slurm" / f"rule_{stage}" / key / "7.log",
        }
        if stage == "ablate_concept":
            found.add(results / "checkpoints" / f"{key}.pt")
        if stage == "write_prompts":
            found |= {results / "prompts" / f"{key}.answers.jsonl", results / "searches" / f"{key}.parquet"}
    return found


def make(files, when=OLD) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0" * 100)
    for file in files:
        os.utime(file, (when, when))
        os.utime(file.parent, (when, when))


def there(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


@pytest.mark.parametrize("seed", range(6))
def test_what_any_table_needs_stays_and_all_else_of_the_pipeline_goes(table, tmp_path, seed):
    draw = random.Random(seed)
    kept = [draw.sample(ROWS[:4], draw.randint(1, 3)) for _ in range(draw.randint(1, 2))]
    results = tmp_path / "results"
    files = files_of(read_table([table(ROWS)], disabled=True)[1])
    foreign = {results / name for name in FOREIGN}
    make(files | foreign)
    tables = [table(rows) for rows in kept]
    needed = {file for own in tables for file in files_of(read_table([own])[1])}
    arguments = [part for own in tables for part in ("--configfile", own)]
    assert main(["gc", *arguments]) == 0 and there(results) == files | foreign  # only told
    assert main(["gc", *arguments, "--remove"]) == 0
    assert there(results) == (files & needed) | foreign
    assert main(["gc", *arguments, "--remove"]) == 0


def test_sizes_are_told_by_stage(table, tmp_path, capsys):
    make(files_of(read_table([table(ROWS[:3])])[1]))
    assert main(["gc", "--configfile", table(ROWS[:2])]) == 0
    said = capsys.readouterr().out
    assert "anchors: 1, 100 B" in said and "base: 3, 300 B" in said and "concepts: 1, 300 B" in said
    assert (
        "--remove removes them" in said and str(tmp_path / "results" / "concepts" / "object-rocket.") in said
    )
    assert size_text(1_234_567) == "1.2 MB"


def test_a_row_that_is_switched_off_keeps_its_results(table, tmp_path, capsys):
    files = files_of(read_table([table(ROWS)], disabled=True)[1])
    make(files)
    assert main(["gc", "--configfile", table(ROWS), "--remove"]) == 0
    assert there(tmp_path / "results") == files and "Nothing to remove" in capsys.readouterr().out


def test_the_results_of_a_row_that_is_switched_off_stay_also_without_its_files(table, tmp_path, capsys):
    picture = tmp_path / "moon.png"
    picture.write_bytes((ROOT / "docs" / "before-after.png").read_bytes())
    row = f"moon,memorization,a caption,moon,star,{{}},{picture}\n"
    header = HEADER.replace("\n", ",image\n")
    other, gone = ROWS[0].replace("\n", ",\n"), ROWS[2].replace("\n", ",\n")
    files = files_of(read_table([table([other, row.format("true")], header)])[1])
    waste = files_of(read_table([table([gone], header)])[1])
    make(files | waste)
    picture.unlink()
    assert main(["gc", "--configfile", table([other, row.format("false")], header), "--remove"]) == 0
    # What the owl's model did to the moon is no result of the moon's row, and is measured again with it.
    on_it = {file for file in files if "interference" in str(file) and "/owl." in str(file)}
    assert on_it and there(tmp_path / "results") == files - on_it
    assert main(["check", "--configfile", table([other, row.format("true")], header)]) == 2
    said = capsys.readouterr().err
    assert "1 row(s) can't be planned" in said and f"{picture}: can't be read" in said


def test_links_are_neither_followed_nor_removed(table, tmp_path):
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    files = files_of(read_table([table(ROWS)])[1])
    make(files)
    unneeded = min((results / "samples").glob("style-neon.*"))
    make([elsewhere / unneeded.name, elsewhere / "inner" / "precious.txt"])
    unneeded.unlink()
    unneeded.symlink_to(elsewhere / unneeded.name)
    os.rename(results / "scores", tmp_path / "scores")
    (results / "scores").symlink_to(tmp_path / "scores")
    folder = min((results / "concepts").glob("style-neon.*"))
    (folder / "inner").symlink_to(elsewhere / "inner")
    os.utime(folder, (OLD, OLD))
    before = there(elsewhere) | there(tmp_path / "scores")
    (folder / "inner").lstat()
    assert main(["gc", "--configfile", table(ROWS[:1]), "--remove"]) == 0
    assert there(elsewhere) | there(tmp_path / "scores") == before
    assert unneeded.is_symlink() and not list((results / "samples").glob("object-rocket.*"))


def test_what_killed_jobs_left_goes_after_a_day_even_of_needed_work(table, tmp_path):
    results, own = tmp_path / "results", table(ROWS[:1])
    files = files_of(read_table([own])[1])
    part = min(file for file in files if file.parent.name == "samples")
    old = [part.with_name(f".{part.name}.123.part"), part.with_name(f"{part.name}.damaged")]
    old.append(results / "report" / ".scores.parquet.9.part")
    young = part.with_name(f".{part.name}.124.part")
    make(files | set(old))
    make([young], time.time() - 3600)
    assert main(["gc", "--configfile", own, "--remove"]) == 0
    assert there(results) == files | {young}


def test_what_changed_just_now_may_be_another_runs(table, tmp_path):
    make(files_of(read_table([table(ROWS[:2])])[1]), time.time() - 60)
    plan = read_table([table(ROWS[:1])])[1]
    assert collect([plan]) == [] and len(collect([plan], time.time() + 3600)) > 4


def test_nothing_is_removed_while_a_run_holds_the_lock(table, tmp_path, monkeypatch, capsys):
    files = files_of(read_table([table(ROWS[:2])])[1])
    make(files)
    own = table(ROWS[:1])
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "embedded").symlink_to(ROOT / "embedded")
    make([tmp_path / ".snakemake" / "locks" / "0.output.lock"])
    monkeypatch.chdir(tmp_path)
    assert main(["gc", "--configfile", own, "--remove"]) == 2
    assert "holds its lock" in capsys.readouterr().err and there(tmp_path / "results") == files


def test_tables_that_did_not_make_the_folder_remove_nothing(table, tmp_path, capsys):
    files = files_of(read_table([table(ROWS[:2])])[1])
    make(files)
    other = table(ROWS[:2], anchors={"images": 7}, evaluation={"seed": 7}, prompts={"count": 7})
    assert main(["gc", "--configfile", other, "--remove"]) == 2
    assert "holds no work of these tables" in capsys.readouterr().err and there(tmp_path / "results") == files


def test_tables_of_different_folders_are_refused(table, tmp_path, capsys):
    other = table(ROWS[:1], results=str(tmp_path / "other"))
    assert main(["gc", "--configfile", table(ROWS[:1]), "--configfile", other]) == 2
    assert "different folders" in capsys.readouterr().err
