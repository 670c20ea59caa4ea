"""How many sampling steps do the embedded model's pictures need? Quality and time beside those of 20 steps, from the same seeds.

    python bench/sampling_steps.py --steps 20 12 10 8 6

Twelve objects, 16 pictures each, from a prompt and seeds that nothing else uses. Recognised: nearest to the own name among all objects
of the world. Cosine: of the scorer's features to the same seed's picture by the first number of steps; agree: recognised as the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from concept_ablation import load_pipeline
from concept_ablation.diffusion.sampler import sample_images
from concept_ablation.evaluation.clip import ClipScorer
from embedded.build.world import OBJECTS, article

SEED = 500_200_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 12, 10, 8, 6])
    parser.add_argument("--scheduler", default="dpmsolver++")
    parser.add_argument("--images", type=int, default=16, help="pictures an object")
    options = parser.parse_args()
    os.chdir(ROOT)
    names = [OBJECTS[i * len(OBJECTS) // 12] for i in range(12)]
    pipeline, scorer = load_pipeline("embedded/emoji-diffusion"), ClipScorer("embedded/emoji-clip")
    texts = scorer.text_features([article(name) for name in OBJECTS])
    own = np.repeat([OBJECTS.index(name) for name in names], options.images)
    prompts = [f"here is {article(OBJECTS[number])}" for number in own]
    seeds = [SEED + i for i in range(len(prompts))]
    first = None
    for steps in options.steps:
        sampler = {"scheduler": options.scheduler, "steps": steps, "guidance_scale": 3.0, "eta": 0.0}
        sampler |= {"precision": "auto", "height": None, "width": None}
        started = time.process_time()
        images = list(sample_images(pipeline, prompts, seeds, sampler=sampler, batch_size=16))
        seconds = (time.process_time() - started) / len(images)
        found = scorer.image_features(images)
        first = found if first is None else first
        nearest, before = (found @ texts.T).argmax(1), (first @ texts.T).argmax(1)
        cosine = (found * first).sum(1)
        print(
            f"{steps:3} steps: {seconds:.3f} CPU s a picture, recognised {(nearest == own).mean():.1%}, cosine {cosine.mean():.3f} "
            f"(a twentieth below {np.quantile(cosine, 0.05):.3f}), agree {(nearest == before).mean():.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
