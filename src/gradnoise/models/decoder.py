"""One decoder-only transformer for vectors or tokens: pre-layer-norm, learned positions, ReLU."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

from gradnoise.base.study import Model


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); shapes (batch, tokens, width)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.query_key_value(self.attention_norm(x))
        query, key, value = parts.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.mlp_out(relu(self.mlp_in(self.mlp_norm(x))))
        return out


class Decoder(nn.Module):
    """Inputs (batch, tokens, inputs) of floats, or (batch, tokens) of token ids, to logits.

    `readout="all"` gives (batch, tokens, outputs); `"last"` gives (batch, outputs) at the last token.
    Weights are N(0, 1/fan-in), residual outputs scaled by 1/sqrt(2 layers), drawn from `generator` alone.
    """

    def __init__(
        self,
        settings: Model,
        inputs: int,
        outputs: int,
        context: int,
        readout: str,
        token_inputs: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        width = settings.width
        self.readout = readout
        self.embed: nn.Module = nn.Embedding(inputs, width) if token_inputs else nn.Linear(inputs, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            Block(width, settings.heads, settings.mlp_ratio) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        residual = 1 / math.sqrt(2 * len(self.blocks))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = residual if name.endswith(("attention_out", "mlp_out")) else 1.0
                module.weight.normal_(std=scale / math.sqrt(module.in_features), generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02, generator=generator)
        self.positions.normal_(std=0.02, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embed(inputs) + self.positions[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        if self.readout == "last":
            x = x[:, -1]
        logits: Tensor = self.head(self.norm(x))
        return logits
