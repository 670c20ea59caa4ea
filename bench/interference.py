"""Two figures of docs/report.md about who harms whom: how well near words are found, and how often a victim is named by mistake.

    python bench/interference.py

`near`: of the three words that the means of token embeddings call nearest, how many the whole text encoder calls nearest, too; all
subjects of concepts.csv and bench/sweep.csv, embedded model. `null`: made-up matrices in which nobody is harmed. Base and ablated
pictures of a seed are drawn from one distribution, independently or sharing most of what makes them differ; all rows share the base
pictures of a victim, so the tests of a column depend on each other.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from concept_ablation.evaluation.interference import compare_victim
from concept_ablation.evaluation.statistics import Bootstrap
from concept_ablation.prompts.encodings import encode_words
from concept_ablation.report.interference import LEVEL, adjust

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "embedded/emoji-diffusion"
TOP, ROWS, VICTIMS, WIDTH = 3, 8, 8, 64


def subjects() -> list[str]:
    """The targets and neighbors of both tables."""
    found = set()
    for file in ("concepts.csv", "bench/sweep.csv"):
        lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
        for row in csv.DictReader(lines):
            found |= {name.strip() for name in f"{row['target']};{row['neighbors']}".split(";")}
    return sorted(found - {""})


def whole_encodings(words: list[str]) -> np.ndarray:
    """The text encoder's pooled output, (words, d), of length 1."""
    import torch
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder").eval()
    with torch.no_grad():
        tokens = tokenizer(words, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        return unit(encoder(tokens["input_ids"], tokens["attention_mask"]).pooler_output.double().numpy())


def near() -> None:
    words = subjects()
    quick = np.stack(list(encode_words(MODEL, words).compare([[place] for place in range(len(words))])))
    encoded = whole_encodings(words)
    whole = encoded @ encoded.T
    for similarity in (quick, whole):
        np.fill_diagonal(similarity, -np.inf)
    chosen, best = (np.argsort(-similarity, axis=1)[:, :TOP] for similarity in (quick, whole))
    ranks = np.argsort(np.argsort(-whole, axis=1), axis=1) + 1
    shared = np.mean([len(set(one) & set(other)) / TOP for one, other in zip(chosen, best, strict=True)])
    mean_rank = np.take_along_axis(ranks, chosen, axis=1).mean()
    print(
        f"{len(words)} words: {shared:.2f} of the {TOP} nearest shared, their mean rank {mean_rank:.1f} (best: 2)"
    )


def null(images: int, share: float, matrices: int = 50) -> None:
    """`share`: of what makes a picture differ from its subject's mean, how much both models' pictures of a seed have in common."""
    generator, bootstrap = np.random.default_rng(0), Bootstrap(0.95, 2, 0)
    values, wrong = [], 0
    for _ in range(matrices):
        means = 2.5 * unit(generator.normal(size=(VICTIMS, WIDTH)))
        texts = {str(place): unit(mean) for place, mean in enumerate(means)}
        noise = generator.normal(size=(VICTIMS, images, WIDTH))
        cells = []
        for _ in range(ROWS):
            own = share * noise + np.sqrt(1 - share**2) * generator.normal(size=noise.shape)
            for place, mean in enumerate(means):
                base, ablated = (unit(mean + 3 * part[place] / np.sqrt(WIDTH)) for part in (noise, own))
                cells.append(compare_victim(str(place), base, ablated, texts, bootstrap)["p"])
        values += cells
        wrong += min(adjust(cells)) <= LEVEL
    below = np.mean(np.array(values) <= LEVEL)
    print(
        f"{images} images, {share} shared: p <= {LEVEL} in {below:.3f} of cells; a victim in {wrong} of {matrices} matrices of {ROWS * VICTIMS}"
    )


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


if __name__ == "__main__":
    near()
    for images in (16, 40):
        for share in (0.0, 0.8):
            null(images, share)
