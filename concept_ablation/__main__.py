"""`python -m concept_ablation`: take results anywhere. docs/formats.md describes each form.

Heavy imports wait until a command runs, so that --help is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from concept_ablation.common.amx import avoid_hidden_tiles
from concept_ablation.common.errors import UserError
from concept_ablation.diffusion.formats import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 after a user's mistake, told in one line."""
    options = _parser().parse_args(arguments)
    avoid_hidden_tiles()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        print(options.run(options))
    except (UserError, OSError) as error:  # the system's errors about files are a user's mistake, too
        text = str(error) if options.run in (_check, _gc, _status) else " ".join(str(error).split())
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0


def _export(options: argparse.Namespace) -> str:
    from concept_ablation.diffusion.delta_export import export_delta

    return export_delta(
        options.delta,
        options.out,
        options.to,
        model=options.model,
        revision=options.revision,
        config=options.config,
        rank=options.rank,
        error=options.error,
        half=options.dtype == "fp16",
    )


def _import(options: argparse.Namespace) -> str:
    from concept_ablation.diffusion.delta import save_delta
    from concept_ablation.diffusion.delta_import import import_delta

    tensors, metadata = import_delta(
        options.file, options.model, revision=options.revision, config=options.config
    )
    save_delta(options.out, tensors, metadata)
    return f"{options.out}: {len(tensors)} tensors, group {metadata['group']}, for {options.model}"


def _card(options: argparse.Namespace) -> str:
    from concept_ablation.report.card import card_of_results, push

    folder = card_of_results(options.results, options.concept, options.out, options.base_model)
    return f"{folder}: pushed to {push(folder, options.push)}" if options.push else f"{folder}: written"


def _check(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import check_table

    return check_table(options.configfile)


def _gc(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import read_table
    from concept_ablation.plan.cleanup import collect, remove, waste_text

    # A row that is switched off still is a row: its results stay.
    plans = [read_table(files, disabled=True)[1] for files in options.configfile or [[]]]
    waste = collect(plans)
    if options.remove:
        remove(waste, plans)
    return waste_text(waste, options.remove, len(waste) if options.verbose else 5)


def _status(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import read_table
    from concept_ablation.report.status import status_text

    return status_text(read_table(options.configfile)[1], most=10**6 if options.verbose else 10)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m concept_ablation", description="Take ablated models anywhere, and bring others in."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(run.__name__.strip("_"), help=text, description=text)
        made.add_argument("--verbose", action="store_true", help="tell more: every layer's error, every file")
        made.set_defaults(run=run)
        return made

    _add_export(command(_export, "write a delta in another program's form"))
    _add_import(command(_import, "read a delta made elsewhere as ours"))
    _add_card(command(_card, "write the model card of one concept that is finished"))
    _add_overlays(
        command(_check, "read the config, the table and every row's prompts, and say what is wrong")
    )
    _add_gc(command(_gc, "list what the results folder holds that no row refers to, and its size"))
    _add_overlays(command(_status, "tell how far a run is, how long it will take and what disk it uses"))
    return parser


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("delta", metavar="DELTA", help="a delta.safetensors")
    export.add_argument("--to", required=True, choices=FORMATS, help="the form")
    export.add_argument(
        "--out", required=True, metavar="PATH", help="the file, for pipeline the folder, to write"
    )
    _add_model(export, required=False, text="the base model; by default the one that the delta names")
    size = export.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="N", help="lora, kohya: every layer's rank")
    size.add_argument(
        "--error",
        type=float,
        metavar="E",
        help="lora, kohya: each layer gets the least rank of at most this relative error (default: 0.1)",
    )
    export.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="pipeline: of its weights")


def _add_import(bring: argparse.ArgumentParser) -> None:
    bring.add_argument(
        "file", metavar="FILE", help="the reference's delta.bin or delta_*.ckpt, or a delta of ours"
    )
    _add_model(bring, required=True, text="the base model that it changes")
    bring.add_argument("--out", required=True, metavar="DELTA", help="the delta.safetensors to write")


def _add_card(card: argparse.ArgumentParser) -> None:
    card.add_argument("results", metavar="RESULTS", help="the folder of a run's results")
    card.add_argument("concept", metavar="CONCEPT", help="the concept's name, as in the report")
    card.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    card.add_argument(
        "--base-model", metavar="ID", help="the base model's hub id, where the run used a local folder"
    )
    card.add_argument(
        "--push", metavar="REPO_ID", help="upload the folder, to a new private repository or an existing one"
    )


def _add_gc(gc: argparse.ArgumentParser) -> None:
    gc.add_argument(
        "--configfile",
        nargs="+",
        action="append",
        metavar="FILE",
        help="overlays of the config, as for snakemake; once for each table that shares the folder: what one of them needs stays",
    )
    gc.add_argument("--remove", action="store_true", help="remove it")


def _add_overlays(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configfile", nargs="*", default=[], metavar="FILE", help="overlays of the config, as for snakemake"
    )


def _add_model(parser: argparse.ArgumentParser, required: bool, text: str) -> None:
    parser.add_argument(
        "--model", required=required, metavar="MODEL", help=f"{text}: a folder, one file, or a hub id"
    )
    parser.add_argument("--revision", metavar="HASH", help="of a hub id")
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="of a model in one file: the folder of a pipeline of the same build, or a .yaml",
    )


if __name__ == "__main__":
    # Libraries' progress bars say nothing to a person who waits for one file.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
