"""`python -m embedded.build [stage ...]`: make the embedded models, stage by stage (also `make embedded`).

A finished stage is skipped, a killed one goes on from its last checkpoint under `embedded/.cache/`: deleting that
folder starts afresh. About 2 hours and a quarter on 2 cores, less on a GPU. Needs npm (glyphs) and `pip install resvg-py`.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
from pathlib import Path

from concept_ablation.common.amx import avoid_hidden_tiles

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("embedded")
# For training on a CPU: keep freed memory, so that every step doesn't ask the kernel for the same pages again.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "OMP_NUM_THREADS": "1",
}


def stage_glyphs(options: argparse.Namespace) -> None:
    """Fetch the emoji packages, pinned by version and content, with npm."""
    from .render import SOURCES

    for package, (version, integrity) in SOURCES.items():
        folder = options.glyphs / package
        if (folder / "icons.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        name = f"@iconify-json/{package}@{version}"
        command = ["npm", "pack", name, "--silent", "--pack-destination", str(folder)]
        archive = (
            folder / subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
        if sha512(archive) != integrity:
            raise SystemExit(
                f"{name}: not the content this recipe was made with (sha512 of {archive} differs)"
            )
        subprocess.run(["tar", "xzf", archive, "-C", folder, "--strip-components", "1"], check=True)
        archive.unlink()


def sha512(path: Path) -> str:
    """Base64 SHA-512 of a file, as npm writes it."""
    import base64
    import hashlib

    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def stage_text(options: argparse.Namespace) -> None:
    """Tokenizer and text encoder (minutes)."""
    from .text import train_text

    train_text(options.cache)


def stage_vae(options: argparse.Namespace) -> None:
    """Autoencoder, both halves (20 to 30 minutes)."""
    from .fit import run_workers
    from .pool import stored_pictures
    from .render import Glyphs
    from .vae import SHARDS, train_vae

    loaded = Glyphs(options.glyphs)
    for shard in range(SHARDS):
        stored_pictures(shard, options.cache, loaded)
    run_workers(train_vae, options.workers, options.cache, options.glyphs)


def stage_decoder(options: argparse.Namespace) -> None:
    """More training of the decoder alone (about 7 minutes; may run beside the U-Net)."""
    from .fit import run_workers
    from .vae import train_decoder

    run_workers(train_decoder, options.workers, options.cache, options.glyphs)


def stage_scorer(options: argparse.Namespace) -> None:
    """The open_clip scorer (12 to 19 minutes)."""
    from .scorer import save_scorer, train_scorer

    train_scorer(options.cache, options.glyphs)
    save_scorer(options.cache, ROOT / "emoji-clip")


def stage_copies(options: argparse.Namespace) -> None:
    """The copy descriptor and its threshold (about 6 minutes)."""
    from .copies import save_copies, train_copies

    train_copies(options.cache, options.glyphs)
    log.info("copy descriptor: %s", save_copies(options.cache, ROOT / "emoji-copy", options.glyphs))


def stage_unet(options: argparse.Namespace) -> None:
    """Latents, then the U-Net (about an hour)."""
    from .fit import run_workers
    from .render import Glyphs
    from .unet import store_latents, store_normalisation, train_unet

    store_normalisation(options.cache, Glyphs(options.glyphs))
    run_workers(store_latents, options.workers, options.cache, options.glyphs)
    run_workers(train_unet, options.workers, options.cache)


def stage_save(options: argparse.Namespace) -> None:
    """Write `embedded/emoji-diffusion` from the newest checkpoints."""
    from .assemble import save_pipeline

    save_pipeline(options.cache, ROOT / "emoji-diffusion", options.glyphs)


def stage_measure(options: argparse.Namespace) -> None:
    """Figures, card and contact sheet (about 4 minutes)."""
    from concept_ablation.diffusion.pipeline import load_pipeline

    from .measure import measure, sampler_settings, sheet_pictures, write_card

    figures = measure(ROOT, options.glyphs, quick=options.quick)
    for name, value in figures.items():
        log.info("%s: %.4f", name, value)
    write_card(ROOT, figures)
    images = sheet_pictures(load_pipeline(ROOT / "emoji-diffusion"), sampler_settings())
    images.save(ROOT / "contact-sheet.png", optimize=True)


def stage_dit(options: argparse.Namespace) -> None:
    """Only when named: the flow-matching transformer on the U-Net's latents (two hours and a half), `embedded/emoji-dit`."""
    from concept_ablation.diffusion.pipeline import load_pipeline

    from .assemble import save_dit
    from .dit import train_dit
    from .fit import run_workers
    from .measure import DIT_BARS, Judge, measure_drawn, sampler_settings, sheet_pictures, write_card
    from .render import Glyphs

    run_workers(train_dit, options.workers, options.cache)
    save_dit(options.cache, ROOT / "emoji-dit", options.glyphs)
    pipeline = load_pipeline(ROOT / "emoji-dit")
    sampler = sampler_settings("emoji-dit.yaml")
    figures = measure_drawn(ROOT, pipeline, sampler, Glyphs(options.glyphs), Judge(ROOT), options.quick)
    for name, value in figures.items():
        log.info("%s: %.4f", name, value)
    write_card(ROOT, {name: round(value, 4) for name, value in figures.items()}, "dit", DIT_BARS)
    sheet_pictures(pipeline, sampler).save(ROOT / "contact-sheet-dit.png", optimize=True)


def stage_restore(options: argparse.Namespace) -> None:
    """Only when named: the shipped weights as checkpoints, to go on training them."""
    from .restore import restore

    restore(ROOT, options.cache)


ONLY_NAMED = ("dit", "restore")
STAGES = {
    name.removeprefix("stage_"): stage for name, stage in list(globals().items()) if name.startswith("stage_")
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m embedded.build", description=__doc__)
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="stage",
        help=f"of {', '.join(STAGES)}; all but {' and '.join(ONLY_NAMED)} when left out",
    )
    parser.add_argument("--workers", type=int, default=2, help="training processes on a CPU, one thread each")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="checkpoints and pictures")
    parser.add_argument("--glyphs", type=Path, help="folder of the emoji packages (default: CACHE/glyphs)")
    parser.add_argument("--quick", action="store_true", help="measure: a third of the prompts")
    options = parser.parse_args()
    options.glyphs = options.glyphs or options.cache / "glyphs"
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))} (allowed: {', '.join(STAGES)})")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.cache.mkdir(parents=True, exist_ok=True)
    avoid_hidden_tiles()  # before the first product of any stage
    for stage in options.stages or [name for name in STAGES if name not in ONLY_NAMED]:
        log.info("stage %s", stage)
        STAGES[stage](options)


if __name__ == "__main__":
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":  # read by the C library at start: set, then start again
        import sys

        os.execve(
            sys.executable, [sys.executable, "-m", "embedded.build", *sys.argv[1:]], {**os.environ, **MALLOC}
        )
    main()
