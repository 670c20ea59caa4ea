"""The published diffusers code and ours beside each other: seconds a picture, a training step and a concept; memory.

    python bench/reference.py --checkout path/to/concept-ablation [--rounds 3]

The checkout is nupurkmr9/concept-ablation (commit c11fb1b). Its `train.main` runs as it is: it draws anchor pictures (DPM-Solver, 25 steps,
guidance 6, batches of 4), then trains (batches of 4, `--scale_lr --hflip`, cross-attn), all in fp32, as it does on a CPU. Pictures to
judge are drawn by its pipeline as its evaluate.py does (DDIM, 50 steps, eta 1, batches of 10), which itself asks for a GPU. Ours does the same
by the same settings, then once more by its own defaults. Each side is a process of its own, on one thread; they alternate, since other
work may share the machine, and CPU seconds are compared: medians over batches, steps and rounds, the first of several left out.

A concept is reckoned from these parts (`Work`), and so are 16 concepts of 4 anchors. Its README's protocol: 1,000 anchor pictures, 200 steps
of 4 on one device, 200 pictures of target and anchor and 50 of each of 4 neighbors by the ablated model, 50 of each by the base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from reference_sides import OUR_BATCH, OUR_STEPS, Part, measure_ours, measure_theirs

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("theirs", "ours", "defaults")
LOOKED = 260  # validation pictures of a row's search for its strength, the mean of docs/method.md's table


@dataclass(frozen=True)
class Work:
    """What a protocol draws and trains for a number of concepts: pictures and steps."""

    anchor_pictures: int
    steps: int
    judged_pictures: int
    validated_pictures: int = 0


def their_work(concepts: int, anchors: int, neighbors: int) -> Work:
    """Their README's counts, each subject's base pictures and each anchor's pictures once. `neighbors`: how many there are in all."""
    subjects = concepts + anchors + neighbors
    return Work(1000 * anchors, 200 * concepts, (200 + 200 + 4 * 50) * concepts + 50 * subjects)


def our_work(concepts: int, anchors: int, neighbors: int, config: Mapping) -> Work:
    """Our config's counts."""
    images, training = config["evaluation"]["images"], config["training"]
    row = images["target"] + images["anchor"] + 4 * images["neighbor"]
    base = images["target"] * concepts + images["anchor"] * anchors + images["neighbor"] * neighbors
    return Work(
        config["anchors"]["images"] * anchors,
        training["steps"] * concepts,
        row * concepts + base,
        LOOKED * concepts,
    )


def seconds_of(work: Work, found: Mapping[str, float], names: tuple[str, str, str]) -> float:
    """CPU seconds of a protocol's work. `names`: of an anchor's picture, a step and a judged picture in `found`."""
    anchor, step, judged = (found[name] for name in names)
    pictures = work.judged_pictures + work.validated_pictures
    return work.anchor_pictures * anchor + work.steps * step + pictures * judged


def reckon(found: Mapping[str, float], config: Mapping) -> Iterator[str]:
    """16 concepts of 4 anchors, with 10 neighbors an anchor: from their loop to ours, one lever after the other."""
    alone, shared = their_work(1, 1, 4), their_work(16, 4, 40)
    theirs = [f"theirs {name}" for name in ("anchor picture", "step", "judged picture")]
    ours = [name.replace("theirs", "ours") for name in theirs]
    own = [name.replace("theirs", "defaults") for name in theirs]
    quick = ("defaults picture", own[1], "defaults picture")
    ours_alone = 16 * seconds_of(
        our_work(1, 1, 4, config), found, ("defaults picture", "defaults own step", "defaults picture")
    )
    lines = {
        "theirs, each concept by itself": 16 * seconds_of(alone, found, theirs),
        "... what concepts share once": seconds_of(shared, found, theirs),
        "our code, all settings equal": seconds_of(shared, found, ours),
        "... our precision and batches": seconds_of(shared, found, own),
        f"... {OUR_STEPS} sampling steps": seconds_of(shared, found, quick),
        "... our counts of pictures and steps, with looks": seconds_of(
            our_work(16, 4, 40, config), found, ("defaults picture", "defaults own step", "defaults picture")
        ),
    }
    first, second = list(lines.values())[:2]
    yield "| 16 concepts, 4 anchors | CPU minutes | this lever | all so far | against sharing |\n|---|---|---|---|---|"
    before = first
    for name, seconds in lines.items():
        yield f"| {name} | {seconds / 60:.1f} | {before / seconds:.2f} | {first / seconds:.1f} | {second / seconds:.1f} |"
        before = seconds
    yield f"\nOne concept by itself: theirs {first / 16 / 60:.1f} CPU minutes, ours by our defaults {ours_alone / 16 / 60:.1f}."


def compare(found: Mapping[tuple[str, str], Part]) -> Iterator[str]:
    """Both sides' medians, and the ratios."""
    yield "| | theirs | ours | ratio | ours, our precision and batches | ratio |\n|---|---|---|---|---|---|"
    for name in ("anchor picture", "judged picture", "step", "start"):
        yield _line(f"{name}, CPU s", [statistics.median(found[side, name].seconds) for side in SIDES])
    for name in ("start", "anchor picture", "judged picture", "step"):
        yield _line(f"{name}, MB", [found[side, name].memory for side in SIDES])
    quick, step = (statistics.median(found["defaults", name].seconds) for name in ("picture", "own step"))
    yield f"\nBy our config: a picture of {OUR_STEPS} steps {quick:.3f} CPU s, a step of {OUR_BATCH} pictures {step:.3f}."


def _line(name: str, values: Iterable[float]) -> str:
    theirs, ours, own = values
    digits = 0 if theirs > 100 else 3
    cells = [
        f"{theirs:.{digits}f}",
        f"{ours:.{digits}f}",
        f"{theirs / ours:.2f}",
        f"{own:.{digits}f}",
        f"{theirs / own:.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def run_side(side: str, options: argparse.Namespace) -> dict[str, Part]:
    """One side in a process of its own, on one thread."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--checkout",
        str(options.checkout),
        "--model",
        str(options.model),
    ]
    command += ["--pictures", str(options.pictures), "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return {name: Part(*part) for name, part in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "embedded/emoji-diffusion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=16, help="anchor pictures a round, in batches of 4")
    parser.add_argument("--steps", type=int, default=10, help="training steps a round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        meter = (
            measure_theirs(
                options.checkout.resolve(), options.model.resolve(), options.pictures, options.steps
            )
            if options.side == "theirs"
            else measure_ours(options.model, options.pictures, options.steps, options.side == "defaults")
        )
        print(json.dumps(meter.parts))
        return
    seconds, memory = defaultdict(list), defaultdict(list)
    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            for name, part in run_side(side, options).items():
                seconds[side, name] += part.seconds
                memory[side, name].append(part.memory)
                print(
                    f"{side}, {name}: {statistics.median(part.seconds):.3f} CPU s, {part.memory:.0f} MB",
                    file=sys.stderr,
                )
    found = {place: Part(own, statistics.median(memory[place])) for place, own in seconds.items()}
    medians = {" ".join(place): statistics.median(own) for place, own in seconds.items()}
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    print("\n".join([*compare(found), "", *reckon(medians, config)]))


if __name__ == "__main__":
    main()
