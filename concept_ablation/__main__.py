"""The command line, `python -m concept_ablation`. docs/formats.md describes export, import and card.

Heavy imports are inside the commands, so that --help is quick.
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
    """Run one command; returns the exit status: 0, or 2 after a user's mistake, whose message is printed."""
    options = _parser().parse_args(arguments)
    avoid_hidden_tiles()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        print(options.run(options))
    except (UserError, OSError) as error:  # errors about files count as the user's
        text = (
            str(error)
            if options.run in (_check, _compare, _demo, _gc, _status)
            else " ".join(str(error).split())
        )
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
    from concept_ablation.report.bundle_card import card_of
    from concept_ablation.report.card import push

    folder = card_of(options.results, options.concept, options.out, options.base_model)
    return f"{folder}: pushed to {push(folder, options.push)}" if options.push else f"{folder}: written"


def _compare(options: argparse.Namespace) -> str:
    from concept_ablation.report.compare import compare_rows

    return compare_rows(options.results)


def _replay(options: argparse.Namespace) -> str:
    from concept_ablation.evaluation.attacks.stage import replay

    line = replay(options.learned, options.delta, options.out, device=options.device)
    text = (
        f"{line['family']} ({line['budget']}{', words: ' + repr(line['learned']) if line['learned'] else ''})"
    )
    model = options.delta or "the unchanged model"
    shares = f"{line['ablated']:.0%} of {line['n']} images, {line['ablated_low']:.0%} to {line['ablated_high']:.0%}"
    return f"{text} against {model}: target seen in {shares}"


def _check(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import check_table

    return check_table(options.configfile)


def _gc(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import read_table
    from concept_ablation.plan.cleanup import collect, remove, waste_text

    # The results of rows that are switched off are kept.
    plans = [read_table(files, disabled=True)[1] for files in options.configfile or [[]]]
    waste = collect(plans)
    if options.remove:
        remove(waste, plans)
    return waste_text(waste, options.remove, len(waste) if options.verbose else 5)


def _status(options: argparse.Namespace) -> str:
    from concept_ablation.plan.checks import read_table
    from concept_ablation.report.status import status_text, watch

    def told() -> str:
        return status_text(read_table(options.configfile)[1], most=10**6 if options.verbose else 10)

    return watch(told) if options.watch else told()


def _demo(options: argparse.Namespace) -> str:
    from concept_ablation.demo.server import serve
    from concept_ablation.plan.checks import read_table

    def load():
        from concept_ablation.demo.catalogue import make_catalogue
        from concept_ablation.demo.studio import Studio
        from concept_ablation.diffusion.stages import load_model

        config, plan = read_table(options.configfile)
        catalogue = make_catalogue(plan, config["evaluation"]["sampler"])
        return catalogue, Studio(load_model(catalogue.model, config["runtime"]["device"]))

    return serve(load, options.port, lambda text: print(text, flush=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m concept_ablation",
        description="Export and import ablated models, check a table, and look after a run.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(run.__name__.strip("_"), help=text, description=text)
        made.add_argument(
            "--verbose", action="store_true", help="print more: every layer's error, every file"
        )
        made.set_defaults(run=run)
        return made

    _add_export(command(_export, "convert a delta to another program's format"))
    _add_import(command(_import, "convert a delta made elsewhere to this project's format"))
    _add_card(command(_card, "write the model card of a finished concept, or of a bundle"))
    _add_replay(command(_replay, "try what an attack learned against one model on another one"))
    compare = command(_compare, "show rows that remove the same target side by side, at equal erasure")
    compare.add_argument("results", metavar="RESULTS", help="a run's results folder")
    _add_overlays(command(_check, "check the config, the table and every row's prompts; nothing is run"))
    _add_gc(
        command(
            _gc,
            "list the files in the results folder that no row refers to, with sizes; --remove removes them",
        )
    )
    status = command(_status, "show how far a run is, how long it will take and how much disk it uses")
    _add_overlays(status)
    status.add_argument("--watch", action="store_true", help="show it again every few seconds, until Ctrl-C")
    demo = command(_demo, "serve a page on this machine that draws any prompt by finished rows; needs gradio")
    _add_overlays(demo)
    demo.add_argument(
        "--port", type=int, default=7860, metavar="N", help="the page's port; 0: any free one (default: 7860)"
    )
    return parser


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("delta", metavar="DELTA", help="the delta.safetensors to convert")
    export.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    export.add_argument(
        "--out", required=True, metavar="PATH", help="the file to write; for pipeline a folder"
    )
    _add_model(export, required=False, text="the base model, by default the one that the delta names")
    size = export.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, metavar="N", help="lora, kohya: use this rank for every layer")
    size.add_argument(
        "--error",
        type=float,
        metavar="E",
        help="lora, kohya: use for each layer the smallest rank with at most this relative error (default: 0.1)",
    )
    export.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="pipeline: the precision of its weights"
    )


def _add_import(bring: argparse.ArgumentParser) -> None:
    bring.add_argument(
        "file",
        metavar="FILE",
        help="the authors' delta.bin or delta_*.ckpt, or a delta.safetensors of this project",
    )
    _add_model(bring, required=True, text="the base model that the delta changes")
    bring.add_argument("--out", required=True, metavar="DELTA", help="the delta.safetensors to write")


def _add_card(card: argparse.ArgumentParser) -> None:
    card.add_argument("results", metavar="RESULTS", help="a run's results folder")
    card.add_argument(
        "concept", metavar="CONCEPT", help="the concept's or the bundle's name, as in the report"
    )
    card.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    card.add_argument(
        "--base-model", metavar="ID", help="the base model's hub id; needed if the run used a local folder"
    )
    card.add_argument(
        "--push", metavar="REPO_ID", help="upload the folder to this repository; a new one is private"
    )


def _add_replay(replay: argparse.ArgumentParser) -> None:
    replay.add_argument("learned", metavar="LEARNED", help="the attacks/KEY.safetensors of a run")
    replay.add_argument(
        "--delta", metavar="DELTA", help="the delta of the model to try it on; without it the unchanged model"
    )
    replay.add_argument("--out", metavar="FILE", help="keep the pictures in this image store (Parquet)")
    replay.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")


def _add_gc(gc: argparse.ArgumentParser) -> None:
    gc.add_argument(
        "--configfile",
        nargs="+",
        action="append",
        metavar="FILE",
        help="overlays of the config, as for snakemake; repeat for each table that shares the results folder, whose files stay",
    )
    gc.add_argument("--remove", action="store_true", help="remove the listed files")


def _add_overlays(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--configfile", nargs="*", default=[], metavar="FILE", help="overlays of the config, as for snakemake"
    )


def _add_model(parser: argparse.ArgumentParser, required: bool, text: str) -> None:
    parser.add_argument(
        "--model",
        required=required,
        metavar="MODEL",
        help=f"{text}: a folder, a single-file checkpoint or a hub id",
    )
    parser.add_argument("--revision", metavar="HASH", help="the commit of a hub id")
    parser.add_argument(
        "--config",
        metavar="PATH",
        help="for a single-file checkpoint: a diffusers pipeline folder of the same architecture, or a .yaml",
    )


if __name__ == "__main__":
    # The libraries' progress bars are of no use in a command that handles one file.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
