"""Our ESD beside the published code's, on the embedded model: its script is run as it stands, and ours on the latents that it drew.

    git clone https://github.com/rohitgandikota/erasing ESD
    python bench/faithfulness_esd.py ESD

Four constants of the script are replaced: the model, its bf16, its picture's 1024 pixels, and the device. What it had in hand in each
step (latents, timestep, loss, gradients) is read before its optimizer moves. Prints the largest relative difference of a step's loss and
of a tensor's gradient, where each step starts from its weights, and of the change of all weights after all steps by our own optimizer.
A control has one setting wrong. Fails where a loss differs by more than 1e-5 or a gradient by more than 1e-3, and where the control doesn't.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tqdm.auto
from diffusers.utils import logging as diffusers_logging

from concept_ablation import load_pipeline
from concept_ablation.methods.esd import METHOD, EsdTraining, esd_loss

TARGET, RATE, SIDE = "owl", 1e-4, 128
REPLACED = {
    '"CompVis/stable-diffusion-v1-4"': "MODEL",
    "torch.bfloat16": "torch.float32",
    "height=width=1024": f"height=width={SIDE}",
}


class Watch:
    """The script's progress bar: it is told of a step between its gradient and its optimizer's move, and looks at what the script has."""

    def __init__(self, steps: range, space: dict) -> None:
        self.range, self.space, self.seen = steps, space, []

    def __iter__(self) -> Iterator[int]:
        return iter(self.range)

    def set_postfix(self, **_: object) -> None:
        names, values = self.space["esd_param_names"], self.space["esd_params"]
        self.seen.append(
            {
                "noisy": self.space["xt"].clone(),
                "timestep": self.space["run_till_timestep_scheduler"].clone(),
                "loss": self.space["loss"].item(),
                "before": {name: value.detach().clone() for name, value in zip(names, values, strict=True)},
                "gradient": {name: value.grad.clone() for name, value in zip(names, values, strict=True)},
            }
        )


def run_theirs(checkout: Path, model: Path, way: str, steps: int) -> tuple[list[dict], dict]:
    """What the script had in hand in each step, and its weights at the end, by their names in the network."""
    code = (checkout / "esd_sd.py").read_text(encoding="utf-8")
    for old, new in REPLACED.items():
        if old not in code:
            sys.exit(
                f"{checkout}/esd_sd.py has no {old}: it is another version than the one that was compared"
            )
        code = code.replace(old, new)
    random.seed(0)  # the script draws timesteps and seeds by it
    space: dict = {"__name__": "__main__", "MODEL": str(model)}
    watches: list[Watch] = []

    def bar(items: range, **_: object) -> Watch:
        watches.append(Watch(items, space))
        return watches[-1]

    argv, real, call = sys.argv, tqdm.auto.tqdm, None
    from diffusers import StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["esd_sd.py", "--erase_concept", TARGET, "--train_method", f"esd-{way}", "--device", "cpu"]
        sys.argv += ["--iterations", str(steps), "--lr", str(RATE), "--save_path", folder]
        sys.path.insert(0, str(checkout))
        call, tqdm.auto.tqdm = StableDiffusionPipeline.__call__, bar
        try:
            exec(compile(code, "esd_sd.py", "exec"), space)  # noqa: S102 - of a checkout that the caller names
        finally:
            sys.argv, tqdm.auto.tqdm, StableDiffusionPipeline.__call__ = argv, real, call
            sys.path.remove(str(checkout))
    after = dict(zip(space["esd_param_names"], space["esd_params"], strict=True))
    return watches[-1].seen, {name: value.detach() for name, value in after.items()}


class OnTheirLatents(EsdTraining):
    """Our training, on latents that were drawn before."""

    def __init__(self, pipeline, settings: dict, seen: list[dict]) -> None:
        super().__init__(pipeline, [TARGET], settings)
        self.left = iter(seen)

    def _latents(self, *_: object):
        one = next(self.left)
        return one["noisy"], one["timestep"].expand(1)


def compare(model: Path, way: str, run: tuple[list[dict], dict], title: str, **wrong: float) -> bool:
    """Print a case's line; whether loss and gradient are theirs. run: what `run_theirs` gave; wrong: settings of a control."""
    seen, theirs = run
    fixed = {"parameters": way, "steps": len(seen), "learning_rate": RATE, "precision": "fp32"}
    settings = {**METHOD.defaults, **fixed, **wrong}
    training = OnTheirLatents(load_pipeline(model, device="cpu"), settings, seen)
    ours = {name.partition(".")[2]: value for name, value in training.parameters.items()}
    if ours.keys() != theirs.keys():
        sys.exit(
            f"{way}: they train {sorted(theirs.keys() ^ ours.keys())[:3]}, we don't, or the other way round"
        )
    losses, gradients = [], []
    text, empty = training.texts[TARGET], training.texts[""]
    for one in seen:
        for name, value in ours.items():
            value.data.copy_(one["before"][name])
            value.grad = None
        given = one["noisy"], one["timestep"].expand(1), text, empty
        loss = esd_loss(training.predict, training.unchanged, *given, settings["negative_guidance"])
        loss.backward()
        losses.append(abs(loss.item() - one["loss"]) / one["loss"])
        gradients += [relative(value.grad, one["gradient"][name]) for name, value in ours.items()]
    start = {name.partition(".")[2]: value for name, value in training.start.items()}
    for name, value in ours.items():
        value.data.copy_(start[name])
    list(training)
    moved = relative(joined(ours, start), joined(theirs, start))
    print(f"| {title} | {max(losses):.1e} | {max(gradients):.1e} | {moved:.1e} |", flush=True)
    return max(losses) <= 1e-5 and max(gradients) <= 1e-3


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-20))


def joined(values: dict, start: dict) -> torch.Tensor:
    return torch.cat([(values[name].detach() - start[name]).flatten() for name in start])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "embedded" / "emoji-diffusion")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    model, good = options.model.resolve(), True
    print("| case | loss | gradient | weights |\n|---|---|---|---|")
    for way in ("x", "u", "x-strict"):
        run = run_theirs(options.checkout.resolve(), model, way, options.steps)
        good &= compare(model, way, run, f"ESD, `{way}`")
        if way == "x":
            good &= not compare(model, way, run, "*control: η 2 for the script's 2*", negative_guidance=2.0)
    sys.exit(not good)


if __name__ == "__main__":
    main()
