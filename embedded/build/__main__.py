"""`python -m embedded.build [stage ...]`: make the embedded models, stage by stage; finished stages are skipped.

A killed run goes on from its last checkpoint under `embedded/.cache/`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"


def stage_vae(cache: Path, glyphs: Path, workers: int) -> None:
    from .fit import run_workers
    from .pool import stored_pictures
    from .render import Glyphs
    from .vae import SHARDS, train_vae

    loaded = Glyphs(glyphs)
    for shard in range(SHARDS):
        stored_pictures(shard, cache, loaded)
    run_workers(train_vae, workers, cache, glyphs)


STAGES = {"vae": stage_vae}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m embedded.build", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)}; all when left out")
    parser.add_argument("--workers", type=int, default=2, help="processes on a CPU, one thread each")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--glyphs", type=Path, default=CACHE / "glyphs", help="folder of the Iconify packages")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.cache.mkdir(parents=True, exist_ok=True)
    for stage in options.stages or STAGES:
        logging.info("stage %s", stage)
        STAGES[stage](options.cache, options.glyphs, options.workers)


if __name__ == "__main__":
    main()
