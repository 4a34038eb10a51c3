"""Checkpoints of a run: weights, states and log in one safetensors file, whole or not at all.

A checkpoint is a means to resume, never a result: it lives in `scratch/`, and the job deletes it when its
outputs are written. A resumed run gives the bytes of an uninterrupted one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from gradnoise.base.errors import InputError
from gradnoise.base.files import canonical_json, write_bytes
from gradnoise.training.loop import State

_MODEL, _OPTIMIZER, _NOISE = "model.", "optimizer.", "noise."


def save(path: Path, state: State, log: dict[str, Any], fingerprint: str) -> None:
    """Write the state and the log (a JSON value) under `fingerprint`, what decides the run's bytes."""
    tensors = {_MODEL + name: tensor for name, tensor in state.model.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": tensor for name, tensor in values.items()}
    progress = {
        "step": state.step,
        "sum_lr": state.sum_lr,
        "loss_hash": state.loss_hash,
        "noise": _packed(state.noise, tensors),
        "log": log,
    }
    metadata = {"fingerprint": fingerprint, "progress": canonical_json(progress).decode()}
    write_bytes(
        path, to_bytes({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
    )


def restore(path: Path, state: State, fingerprint: str) -> dict[str, Any] | None:
    """Load a checkpoint into `state` and return its log; None if there is none, or one of other settings.

    Raises `InputError` for a file that is cut short or damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            str(path), "is not a whole checkpoint", "delete it; the run then starts again"
        ) from error
    state.model.load_state_dict(_under(_MODEL, tensors))
    values: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in _under(_OPTIMIZER, tensors).items():
        index, key = name.split(".", 1)
        values.setdefault(int(index), {})[key] = tensor
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": values, "param_groups": groups})
    progress = json.loads(metadata["progress"])
    state.step, state.sum_lr = progress["step"], progress["sum_lr"]
    state.loss_hash, state.noise = progress["loss_hash"], _unpacked(progress["noise"], tensors)
    log: dict[str, Any] = progress["log"]
    return log


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _packed(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as a JSON value; its tensors go into `tensors`, under numbered names."""
    if isinstance(value, torch.Tensor):
        name = f"{_NOISE}{len(tensors)}"
        tensors[name] = value
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, dict):
        # Pairs, because keys of a JSON object would all become text.
        return {"pairs": [[key, _packed(inner, tensors)] for key, inner in value.items()]}
    return [_packed(inner, tensors) for inner in value] if isinstance(value, list | tuple) else value


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(value["device"])
    return {key: _unpacked(inner, tensors) for key, inner in value["pairs"]}
