"""The presets `paper` and `diffusers`, value by value and kind by kind, beside what the authors published.

PUBLISHED has a line a setting. Its columns are the kinds; `overlapping` is an object whose name holds the anchor's word
(grumpy cat), which the authors train with prior preservation. Sources are files of github.com/nupurkmr9/concept-ablation,
commit c11fb1b. Where ours differs, `ours` is what the preset has instead, and `why`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml

from concept_ablation.methods.ablation.settings import TrainingSettings
from concept_ablation.plan.settings import merge, shared_settings, with_own

ROOT = Path(__file__).parents[1]
PAPER, DIFFUSERS = "compvis/README.md", "diffusers/README.md"
# Column -> kind and the row's own settings. The CompVis code has no unsafe content: `unsafe` is the diffusers code's for both.
COLUMNS = {
    "style": ("style", {}),
    "object": ("object", {}),
    "overlapping": ("object", {"training.prior_preservation": True}),
    "memorization": ("memorization", {}),
    "unsafe": ("nudity", {}),
}


@dataclass(frozen=True)
class By:
    """A value that depends on the kind: `rest`, but for the columns that are named."""

    rest: Any
    columns: dict = field(default_factory=dict)

    def __getitem__(self, column: str) -> Any:
        return self.columns.get(column, self.rest)


def by(rest, **columns) -> By:
    return By(rest, columns)


@dataclass(frozen=True)
class Line:
    """One setting: what the CompVis and the diffusers code have (`unsafe`: of the latter), and where that is published."""

    setting: str
    compvis: Any
    diffusers: Any
    where: str
    ours: Any = None  # the presets' value, where it isn't the published one
    why: str = ""

    def published(self, preset: str, column: str) -> Any:
        value = self.compvis if preset == "paper" and column != "unsafe" else self.diffusers
        return value[column] if isinstance(value, By) else value

    def wanted(self, preset: str, column: str) -> Any:
        if self.why:
            return self.ours[column] if isinstance(self.ours, By) else self.ours
        return self.published(preset, column)


SCALED = "learning_rate x accumulation x batch x processes (train.py of both), x 2 with prior preservation (diffusers)"
OWN_SEED = "every image has its own seed here, theirs is one a process; no image can be the same"
PUBLISHED = [
    # What a step sees, and how far it goes: the settings below, merged.
    Line("images of the target", by(8, overlapping=4, memorization=2), by(8, memorization=4),
         "configs/finetune_*.yaml: batch_size 4, memorization 2; --gpus 0,1; train.py halves the batch for --regularization. "
         f"{DIFFUSERS}: train_batch_size 4, memorization 2, 2 GPUs"),
    Line("prior images", by(0, overlapping=4, memorization=2), by(0, overlapping=8, memorization=4, unsafe=8),
         "the same; diffusers: collate_fn adds as many"),
    Line("scaled learning rate", by(1.6e-5, memorization=2e-6), by(1.6e-5, overlapping=3.2e-5, memorization=4e-6, unsafe=6.4e-5),
         SCALED),
    # Prompts
    Line("prompts.count", 200, 200, "assets/finetune_prompts: 200 lines a file; people.txt 204, of which 8 stand twice"),
    Line("prompts.templates", by([], style="compvis"), by([], style="diffusers", unsafe="diffusers"),
         "compvis/src/finetune_data.py get_styled_prompt; diffusers/utils.py __getprompt__"),
    Line("prompts.search.anchors", by(ANY, memorization=10), by(ANY, memorization=10),
         "anchor_size 10 (compvis/src/filter.py); the first 10 (diffusers/utils.py)"),
    Line("prompts.search.targets", by(ANY, memorization=4), by(ANY, memorization=3),
         "compvis/preprocessing.py: the caption and the 3 worst; diffusers/utils.py: the caption and 2 that reach 0.6",
         by(ANY, memorization=3),
         "CompVis takes its 3 worst even if they don't bring the picture back; ours must, so three with the caption do"),
    # The anchor's pictures
    Line("anchors.images", 1000, 1000,
         "train_size, num_class_images: 1000; compvis/README.md's commands say 200, compvis/scripts leave the 1000. Of a "
         "memorized picture's they drop the copies, ours draws others for them"),
    Line("anchors.seed", 42, 42, "one a process: compvis/src/utils.py initialize; diffusers/train.py --seed", 0, OWN_SEED),
    Line("anchors.sampler.scheduler", "ddim", "dpmsolver++", "compvis/src/utils.py DDIMSampler; diffusers/train.py DPMSolver"),
    Line("anchors.sampler.steps", 200, 25, "compvis/preprocessing.py; diffusers/train.py num_inference_steps"),
    Line("anchors.sampler.guidance_scale", 6.0, 6.0, "compvis/src/utils.py scale; diffusers/train.py guidance_scale"),
    Line("anchors.sampler.eta", 1.0, 1.0, "compvis/src/utils.py ddim_eta; diffusers/train.py eta, which DPM-Solver ignores"),
    Line("anchors.sampler.precision", "fp16", "fp16", "compvis/src/utils.py autocast; diffusers/train.py on CUDA", "auto",
         "bf16 where the hardware has it, else fp32: the presets must run on a CPU, too"),
    Line("anchors.sampler.height", 512, 512, "configs/finetune_*.yaml size; --resolution=512", None, "the model's own"),
    Line("anchors.sampler.width", 512, 512, "the same", None, "the model's own"),
    Line("anchors.negative_target", False, by(False, unsafe=True), "diffusers/train.py negative_prompt: nudity, inappropriate"),
    # The ablation
    Line("training.parameter_group", by("cross-attn", memorization="full-weight"),
         by("cross-attn", memorization="full-weight", unsafe="attn"), f"{PAPER} parameter_group; {DIFFUSERS} --parameter_group"),
    Line("training.loss", "model-based", "model-based", f"{PAPER}, {DIFFUSERS} loss_type_reverse"),
    Line("training.steps", by(100, memorization=400), by(100, memorization=400, unsafe=400),
         f"{PAPER} train_max_steps (the configs stop at 110 and 410, what counts was saved before); {DIFFUSERS} --max_train_steps"),
    Line("training.learning_rate", by(2e-6, memorization=5e-7), by(2e-6, memorization=5e-7, unsafe=4e-6),
         f"configs/finetune_*.yaml base_learning_rate; {DIFFUSERS} --learning_rate"),
    Line("training.scale_lr", "compvis", "diffusers", "compvis/train.py scale_lr: on by default; diffusers/README.md --scale_lr"),
    Line("training.batch_size", by(8, memorization=4), by(8, memorization=4), "as `images of the target`, over both GPUs"),
    Line("training.gradient_accumulation", 1, 1, "neither sets it"),
    Line("training.gradient_checkpointing", False, False, "compvis/src/model.py change_checkpoint; diffusers/README.md"),
    Line("training.optimizer.name", "adamw", "adamw", "compvis/src/model.py configure_optimizers; diffusers/train.py"),
    Line("training.optimizer.beta1", 0.9, 0.9, "torch's AdamW; --adam_beta1"),
    Line("training.optimizer.beta2", 0.999, 0.999, "torch's AdamW; --adam_beta2"),
    Line("training.optimizer.weight_decay", 0.01, 0.01, "torch's AdamW; --adam_weight_decay"),
    Line("training.optimizer.epsilon", 1e-8, 1e-8, "torch's AdamW; --adam_epsilon"),
    Line("training.lr_scheduler", "constant", "constant", "compvis/src/model.py has none; --lr_scheduler"),
    Line("training.lr_warmup_steps", 0, 500, "--lr_warmup_steps", 0, "diffusers' constant schedule ignores its warm-up"),
    Line("training.augmentation", by("none", object="compvis", overlapping="compvis"),
         by("diffusers", style="none", unsafe="none"),
         f"configs/finetune_*.yaml aug: False but for objects; {DIFFUSERS} --noaug for style and unsafe content"),
    Line("training.mask_border", False, True, "compvis/src/finetune_data.py: ones; diffusers/utils.py preprocess, unscaled too"),
    Line("training.hflip", 0.5, 0.5, "compvis/src/finetune_data.py flip_p; diffusers/README.md --hflip in every command"),
    Line("training.prior_preservation", by(False, overlapping=True, memorization=True),
         by(False, overlapping=True, memorization=True, unsafe=True),
         f"compvis/scripts --regularization; {DIFFUSERS} --with_prior_preservation, for an overlapping object in its text"),
    Line("training.prior_form", "halved", "doubled", "compvis/train.py batch_size // 2; diffusers/utils.py collate_fn"),
    Line("training.prior_weight", 0.2, 1.0, "compvis/src/model.py training_step; diffusers/README.md, train.py prior_loss_weight"),
    Line("training.max_grad_norm", None, 1.0, "compvis: Lightning's default, none; diffusers/train.py --max_grad_norm"),
    Line("training.precision", "fp32", "fp32", "compvis: Lightning's default; diffusers/train.py without --mixed_precision"),
    Line("training.teacher", "current", "current", "compvis/src/model.py p_losses; diffusers/train.py model_pred_anchor"),
    Line("training.detach_bos", True, True, "compvis/src/model.py new_forward; diffusers/model_pipeline.py attention processor"),
    Line("training.preserve", "none", "none", "neither knows neighbors"),
    Line("training.start", "none", "none", "neither has one"),
    Line("training.harden.every", 0, 0, "neither attacks its model"),
    Line("training.strength", "fixed", "fixed", "both take all of their steps"),
    Line("training.seed", 23, 42, "compvis/train.py --seed; diffusers/train.py --seed", 0, "draws are made in another order here"),
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))


def flat(settings: dict, path: str) -> dict:
    """Dotted path -> value."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{path}.{name}") if isinstance(value, dict) else {f"{path}.{name}": value}
    return found


def merged(config: dict, preset: str, column: str) -> dict:
    """Setting -> value after all layers, and what a training makes of them."""
    kind, own = COLUMNS[column]
    settings = with_own(shared_settings(config, kind, preset), own)
    plain = dict(settings["training"])
    training = TrainingSettings.from_spec({**plain, "group": plain["parameter_group"]})
    found = {
        path: value
        for name in ("prompts", "anchors", "training")
        for path, value in flat(settings[name], name).items()
    }
    found["images of the target"] = training.images * training.gradient_accumulation
    found["prior images"] = found["images of the target"] if training.prior_preservation else 0
    found["scaled learning rate"] = training.scaled_learning_rate
    return found


@pytest.mark.parametrize("preset", ["paper", "diffusers"])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_preset_is_the_published_recipe(config, preset, column):
    found = merged(config, preset, column)
    wrong = []
    for line in PUBLISHED:
        value, wanted = found[line.setting], line.wanted(preset, column)
        if value != (pytest.approx(wanted, rel=1e-9) if isinstance(wanted, float) else wanted):
            wrong.append(f"{line.setting}: {value}, wanted {wanted} ({line.where})")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_every_setting_of_the_anchors_pictures_and_the_ablation(config):
    settings = [line.setting for line in PUBLISHED]
    assert len(settings) == len(set(settings))
    decided = {**flat(config["anchors"], "anchors"), **flat(config["training"], "training")}
    # What is preserved, how a strength is searched and how a model is attacked does nothing where it isn't, as in both presets.
    parts = ("training.preserve_", "training.search.", "training.harden.")
    unused = {name for name in decided if name.startswith(parts)}
    assert decided.keys() - unused <= set(settings)


def test_the_table_has_every_setting_that_a_preset_names(config):
    named = set()
    for preset in ("paper", "diffusers"):
        own = config["presets"][preset]
        for layer in (own, *own["kinds"].values()):
            for section in ("prompts", "anchors", "method", "training"):
                named |= flat(layer.get(section, {}), section).keys()
    assert named and named <= {line.setting for line in PUBLISHED}


def test_the_table_tells_each_difference_from_what_was_published():
    for line in PUBLISHED:
        differs = any(
            line.wanted(preset, column) != line.published(preset, column)
            for preset in ("paper", "diffusers")
            for column in COLUMNS
        )
        assert differs == bool(line.why), line.setting


def test_unsafe_content_is_the_same_in_both_presets_and_kinds(config):
    found = [
        shared_settings(config, kind, preset)
        for kind in ("nudity", "inappropriate")
        for preset in ("paper", "diffusers")
    ]
    for settings in found:
        for section in ("prompts", "anchors", "training"):
            assert settings[section] == found[0][section]


def test_judging_is_no_part_of_a_preset_and_stable_diffusions_is_the_papers(config):
    for preset in config["presets"].values():
        assert "evaluation" not in {
            *preset,
            *(section for kind in preset.get("kinds", {}).values() for section in kind),
        }
    merge(config := dict(config), yaml.safe_load((ROOT / "config" / "sd14.yaml").read_text(encoding="utf-8")))
    for kind in config["kinds"]:
        judged = shared_settings(config, kind, None)["evaluation"]
        # compvis/evaluate.py: numgen 50, x 4 for target and anchor; 50 steps; compvis/src/utils.py: DDIM, scale 6, eta 1
        published = {"target": 200, "anchor": 200, "neighbor": 50, "paraphrase": 50}
        assert judged["images"] == published | {"victim": 16}, "the paper draws no other rows' subjects"
        sampler = {"scheduler": "ddim", "steps": 50, "guidance_scale": 6.0, "eta": 1.0}
        assert judged["sampler"].items() >= sampler.items()
        assert judged["scorer"] == {"model": "ViT-B-32", "pretrained": "openai"}
