"""The tokens of a text encoder that isn't there: all alike, so one that weighs as much as all of them stands for them.

Stable Diffusion 3's pipeline puts 256 zeros in the place of an absent T5. In the network they have no places and meet the same weights, so they
stay equal from block to block, and attention gives n equal keys together what one gets whose logit is larger by log n. On the embedded model
they are three of four tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN_ATTENTION_TOKENS = 512  # of picture and text; the logits of many more would fill the memory


class WeighedJointAttention:
    """diffusers' joint attention of picture and text, in which the text's last token counts as `count` tokens."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of picture (n, places, width) and text (n, tokens, width): what the attention adds to each."""

        def heads(states: Tensor, norm: nn.Module | None = None) -> Tensor:
            states = states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            return states if norm is None else norm(states)

        pixels, text = hidden_states, encoder_hidden_states
        query = [heads(attn.to_q(pixels), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)]
        key = [heads(attn.to_k(pixels), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)]
        value = [heads(attn.to_v(pixels)), heads(attn.add_v_proj(text))]
        query, key, value = (torch.cat(parts, dim=2) for parts in (query, key, value))
        counts = torch.ones(key.shape[2], device=key.device)
        counts[-1] = self.count
        found = attend(query, key, value.to(query.dtype), counts.log().to(query.dtype)[None, None, None])
        places, tokens = pixels.shape[1], text.shape[1]
        pixels, text = found.transpose(1, 2).flatten(2).split([places, tokens], dim=1)
        return attn.to_out[0](pixels), text if attn.context_pre_only else attn.to_add_out(text)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of (n, heads, tokens, width) with `bias` on its logits; few tokens by products and a softmax, which a CPU does a tenth to a fifth quicker."""
    if key.shape[2] > PLAIN_ATTENTION_TOKENS:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (logits + bias).softmax(-1).to(value.dtype) @ value


class Fold:
    """A hook before the layer that takes the text: of the zeros at its end one stays. A copy of the network has a copy of both."""

    def __init__(self, attention: WeighedJointAttention) -> None:
        self.attention = attention

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (states,) = inputs  # (n, tokens, width)
        told = states.detach().abs().amax((0, 2)).nonzero()
        tokens = int(told[-1]) + 1 if len(told) else 0
        self.attention.count = max(states.shape[1] - tokens, 1)
        return (states[:, : tokens + 1],)


def fold_absent(network: nn.Module) -> None:
    """Let a transformer of Stable Diffusion 3's class take the zeros at its text's end as one token; its predictions differ by rounding."""
    attention = WeighedJointAttention()
    for block in network.transformer_blocks:
        block.attn.set_processor(attention)
    network.context_embedder.register_forward_pre_hook(Fold(attention))
