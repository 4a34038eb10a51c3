"""Which parameters are measured, and which layer and class each belongs to.

Classes are always told apart, so that one embedding row cannot carry a paper's figure.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradnoise.base.errors import InputError
from gradnoise.noise.options import Options
from gradnoise.noise.update import Member

Classify = Callable[[str, Tensor], str]
# Coordinates of a tensor that are looked at whatever `share` says.
WHOLE = 4096


def members_of(model: nn.Module, optimizer: torch.optim.Optimizer, options: Options) -> list[Member]:
    """The optimizer's trainable parameters under their names in the model, in the optimizer's order.

    Raises `InputError` for a parameter that the model does not have.
    """
    # torch.compile puts a module of its own around.
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
    classify = options.classes or class_of(model)
    found: list[Member] = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            if parameter not in names:
                raise InputError("optimizer", "a parameter the model lacks", "give the model that it trains")
            name = names[parameter]
            index = _sampled(parameter, options.share, options.seed + len(found))
            scale = 1.0 if index is None else parameter.numel() / len(index)
            found.append(
                Member(name, parameter, number, layer_of(name), classify(name, parameter), index, scale)
            )
    return found


def _sampled(parameter: Tensor, share: float, seed: int) -> Tensor | None:
    size = parameter.numel()
    if share >= 1 or size <= WHOLE:
        return None
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(size, generator=draw)[: max(WHOLE, round(share * size))]
    return chosen.sort().values.to(parameter.device)


def layer_of(name: str) -> str:
    """The block that a name puts a parameter in: up to its first number ("blocks.3"), else the first word."""
    words = name.split(".")
    numbers = [n for n, word in enumerate(words) if word.isdigit()]
    return ".".join(words[: numbers[0] + 1]) if numbers else words[0]


def class_of(model: nn.Module) -> Classify:
    """A function from a parameter's name to its class: embedding, head, norm, bias or matrix.

    A tied head counts as embedding. A head is a Linear layer that Hugging Face calls the output embedding, or
    whose last name is head, lm_head, unembed, output, classifier or score. Parameters that no layer owns by
    type (positions as a plain tensor) are embeddings if their name says so.
    """
    owners: dict[Tensor, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, (path, module))
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None

    def classify(name: str, parameter: Tensor) -> str:
        path, module = owners[parameter]
        if isinstance(module, nn.Embedding):
            return "embedding"
        if "norm" in type(module).__name__.lower():
            return "norm"
        last = path.rsplit(".", 1)[-1]
        heads = ("head", "lm_head", "unembed", "output", "classifier", "score")
        if module is output or (isinstance(module, nn.Linear) and last in heads):
            return "head"
        if any(word in name.rsplit(".", 1)[-1] for word in ("emb", "pos")):
            return "embedding"
        return "matrix" if parameter.ndim > 1 else "bias"

    return classify
