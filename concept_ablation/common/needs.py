"""What methods, bundles and attacks can ask of a family of models: a family that hasn't one of these says why.

The plan asks before anything runs, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Need = Literal["text-projections", "begin-of-text", "guidance", "one-vocabulary"]
NEEDS: Mapping[Need, str] = {
    "text-projections": "keys and values that are linear in the text's encoding",
    "begin-of-text": "a first token that is the same for every prompt in every layer",
    "guidance": "a prediction without a prompt to lead away from",
    "one-vocabulary": "one text encoder",
}
"""Need -> what a message calls it."""
ATTACK_NEEDS: Mapping[str, Need] = {"prefix": "one-vocabulary"}
"""An attack -> what it needs. An attack's own file imports torch, which the plan may not."""
