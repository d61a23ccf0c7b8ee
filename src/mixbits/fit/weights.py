"""Weights on disk: safetensors or a state dict, loaded without running code."""

from __future__ import annotations

from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mixbits.fit.folder import RunFolder


def load_weights_(model: nn.Module, path: Path) -> None:
    """Load trained weights into a network; every key and shape must fit."""
    tensors = read_tensors(path)
    wanted = model.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # older files leave these out
    problems = [f"missing {key}" for key in wanted if key not in tensors and key not in counters]
    problems += [f"unexpected {key}" for key in tensors if key not in wanted]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the network needs {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"{path} does not fit the network: {'; '.join(problems[:3])}{more}. "
            "Check that --network builds the network that these weights were trained in."
        )
    model.load_state_dict(tensors, strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a state dict saved by torch (or its ``state_dict`` entry)."""
    if not path.is_file():
        raise ValueError(f"weights {path} do not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on files that are not its own
        raise ValueError(
            f"{path} cannot be loaded safely ({type(error).__name__}); save the network's state_dict() with "
            "torch.save, or as safetensors"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; save the network's state_dict()")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def write_tensors(folder: RunFolder, name: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors of a run as safetensors, whole or not at all."""
    apart = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    folder.write_bytes(name, save(apart))
