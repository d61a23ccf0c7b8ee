"""Capture: a trained ``nn.Module`` becomes a graph whose edges can be quantized.

See docs/decisions/0001-capture.md.
"""

from __future__ import annotations

import copy
import inspect
import io
import linecache
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn, overrides
from torch.export import default_decompositions
from torch.fx.graph import CodeGen
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from mixbits.graph.calls import arguments

# Modules that behave differently in training: kept as modules, everything else becomes aten operations.
MODAL = (_BatchNorm, _DropoutNd)
# Classes that hold a network and average its gradients; those of FSDP are imported by whoever uses them.
WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}
# Operations that are written with others.
DECOMPOSED: dict[Any, Any] = {
    torch.ops.aten.einsum.default: default_decompositions()[torch.ops.aten.einsum.default]
}
TORCH_FOLDER = str(Path(torch.__file__).parent)


class CaptureError(ValueError):
    """A network that cannot be captured; the message names the remedy, and the line at fault if known."""


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ``CaptureError`` for a network that is in a wrapper for several processes already."""
    wrapper = next((kind for part in model.modules() for kind in _names(part) if kind in WRAPPERS), "")
    if not wrapper and "_original_forward" in vars(model):  # where Accelerate keeps what it wraps
        wrapper = "accelerator.prepare"
    if wrapper:
        raise CaptureError(
            f"the network is in {wrapper} already, which would not average the gradients of quantizers that "
            "are added now: capture the network itself, begin the training, then wrap training.module"
        )


def _names(module: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]


def capture_module(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """``model`` as an ``fx.GraphModule`` of aten operations that still trains.

    ``example`` is one batch of inputs, float ``[n, ...]``; only its shape and type matter. The result shares
    no parameter with ``model``, has the same state-dict keys, takes any batch size, and follows
    ``train()``/``eval()``; it comes in eval mode.
    """
    refuse_wrapped(model)
    _refuse_narrow(model)
    model = copy.deepcopy(model).eval()
    if example.shape[0] < 2:
        example = torch.cat([example, example])
    modal = _modal_modules(model)
    _plain_dropout_(model)
    module = _export(model, example)
    _refuse_frozen_functional(module, model, example)
    _lift_modal_(module, modal)
    _refuse_random(module.graph)
    _drop_identities_(module.graph)
    _reshape_views_(module.graph)
    module.graph.eliminate_dead_code()
    _plain_signature_(module.graph)
    captured = fx.GraphModule(module, module.graph)
    _name_nodes_(captured)
    _check_same(model, captured, example)
    return captured


def reading_training(model: nn.Module) -> list[str]:
    """Modules that are not torch's own and whose ``forward`` reads ``self.training``."""
    return [
        path or "the network"
        for path, child in model.named_modules()
        if not type(child).__module__.startswith("torch.")
        and "training" in getattr(getattr(type(child).forward, "__code__", None), "co_names", ())
    ]


def _refuse_narrow(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise CaptureError(
                f"{name}: it is {parameter.dtype}, which is too coarse to train and to pack from; "
                "call model.float() first"
            )


def _modal_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modal modules by path; one that is used in two places has two."""
    return {
        path: child for path, child in model.named_modules(remove_duplicate=False) if isinstance(child, MODAL)
    }


def _plain_dropout_(model: nn.Module) -> None:
    """Every kind of dropout becomes ``nn.Dropout``: torch.export leaves no trace of others in evaluation."""
    for path, child in _modal_modules(model).items():
        if isinstance(child, _DropoutNd):
            model.set_submodule(path, nn.Dropout(child.p).eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.export prints while it tries: the error that counts is raised."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The exported module, batch dynamic: not strict first, then strict (which understands ``len(x)``)."""
    failures: list[Exception] = []
    for strict in (False, True):
        try:
            with _quiet():
                program = torch.export.export(
                    model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
                )
                return program.run_decompositions(DECOMPOSED).module(check_guards=False)
        except Exception as error:  # torch.export raises many types
            failures.append(error)
    raise CaptureError(_explain(failures[0])) from failures[0]


def _explain(error: Exception) -> str:
    """One line of what went wrong and the user's own source line that caused it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    place = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        own = frame.filename.startswith((TORCH_FOLDER, "<")) or frame.filename in (__file__, inspect.__file__)
        if not own:
            source = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
            place = f"\n  {frame.filename}, line {frame.lineno}: {source}"
            break
    remedy = (
        "Control flow that depends on tensor values cannot be captured: use torch.where or torch.cond, "
        "or move it out of forward()."
        if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__
        else "A size in forward() fixes the batch, in a view or an expand perhaps: write -1, or x.shape[0]."
        if "Constraints violated" in reason
        else "The network must take one float tensor with the batch first, for any batch size, "
        "and be traceable by torch.export."
    )
    return f"the network cannot be captured: {reason}{place}\n  {remedy}"


def _owner(node: fx.Node) -> str:
    """Path of the module that the node was called in, '' for the network itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0].split("@")[0] if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def _refuse_frozen_functional(module: fx.GraphModule, model: nn.Module, example: Tensor) -> None:
    """Functional batch norm would stay frozen, functional dropout be lost: say so, name the remedy."""
    modal = _modal_modules(model)
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and "batch_norm" in name and _owner(node) not in modal:
            raise CaptureError(
                f"{_owner(node) or 'the network'}: functional batch_norm cannot follow train() and eval(); "
                "use an nn.BatchNorm2d module"
            )
        if node.op == "call_function" and "instance_norm" in name and node.args[3] is not None:
            raise CaptureError(
                f"{_owner(node)}: instance norm with running statistics cannot follow train() and "
                "eval(); use track_running_stats=False"
            )
    # A training pass of a copy finds calls under `if self.training` too. Other failures are not capture's.
    training, calls = copy.deepcopy(model).train(), _DropoutCalls()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(Exception), calls:
        training(example)
    if calls.places:
        raise CaptureError(
            "functional dropout is lost when a network is captured; use an nn.Dropout module"
            + calls.places[0]
        )


def _refuse_random(graph: fx.Graph) -> None:
    """In evaluation nothing may be drawn."""
    for node in graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if random and arguments(node).get("dropout_p") != 0:  # attention draws for its dropout alone
            raise CaptureError(
                f"{address(node)}: it draws random numbers in evaluation too, so no two runs are alike; "
                "draw them only if self.training"
            )


class _DropoutCalls(TorchFunctionMode):
    """Notes the source lines that call a dropout function; the modules of torch may."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            own = (__file__, F.__file__, overrides.__file__)
            caller = next(frame for frame in reversed(traceback.extract_stack()) if frame.filename not in own)
            if not caller.filename.startswith(TORCH_FOLDER):
                self.places.append(f"\n  {caller.filename}, line {caller.lineno}: {caller.line}")
        return func(*args, **(kwargs or {}))


def _lift_modal_(module: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Replace the operations of each modal module by a call of a module with its state."""
    graph = module.graph
    for node in list(graph.nodes):
        path = _owner(node)
        child = modules.get(path)
        if node.op != "call_function" or child is None or "getitem" in str(node.target):
            continue
        parent, _, name = path.rpartition(".")
        holder = module.get_submodule(parent) if parent else module
        setattr(holder, name, child)
        results = [user for user in node.users if "getitem" in str(user.target)] or [node]
        with graph.inserting_before(node):
            call = graph.call_module(path, (node.args[0],))
        call.meta.update(results[0].meta)
        call.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        results[0].replace_all_uses_with(call)
    graph.eliminate_dead_code()


def _plain_signature_(graph: fx.Graph) -> None:
    """One tensor in, one tensor out, without the containers that torch.export wraps around them."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    results = output.args[0]
    if isinstance(results, list | tuple):
        if len(results) != 1:
            raise CaptureError(f"the network returns {len(results)} tensors; mixbits needs one, the logits")
        output.args = (results[0],)
    graph.set_codegen(CodeGen())


IDENTITIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.contiguous.default,
}


def _drop_identities_(graph: fx.Graph) -> None:
    """Remove operations that hand their input on: copies, and slices of everything."""
    for node in list(graph.nodes):
        whole = node.target is torch.ops.aten.slice.Tensor and (
            node.args[2:3] in ((), (0,), (None,))
            and (len(node.args) < 4 or node.args[3] is None or node.args[3] == sys.maxsize)
            and node.args[4:] in ((), (1,))
        )
        if node.target in IDENTITIES or whole:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _reshape_views_(graph: fx.Graph) -> None:
    """Views become reshapes, which do not depend on strides.

    Dropped copies, quantizers and other types change strides.
    """
    for target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = torch.ops.aten.reshape.default


def address(node: fx.Node) -> str:
    """Where a node stands: ``input``, ``layer1.0.conv1.weight``, ``layer1.0/relu``."""
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "call_module":
        return str(node.target)
    function = str(getattr(node.target, "__name__", node.target)).split(".")[0].rstrip("_")
    owner = _owner(node)
    return f"{owner}/{function}" if owner else function


def _name_nodes_(captured: fx.GraphModule) -> None:
    """Give every node its address as ``meta['address']``; the second use of one gets ``.1`` and so on."""
    seen: Counter[str] = Counter()
    for node in captured.graph.nodes:
        name = address(node)
        node.meta["address"] = name if not seen[name] or node.op == "get_attr" else f"{name}.{seen[name]}"
        seen[name] += 1


def _check_same(model: nn.Module, captured: fx.GraphModule, example: Tensor) -> None:
    """The captured network computes what the model computes and has its state-dict keys.

    Of a parameter under several names it has one.
    """
    tensors = model.state_dict(keep_vars=True)
    used = {id(tensors[key]) for key in captured.state_dict() if key in tensors}
    unused = [key for key, tensor in tensors.items() if id(tensor) not in used]
    if unused:
        raise CaptureError(
            f"forward() does not use {len(unused)} tensors of the state dict in eval mode, the first is "
            f"{unused[0]!r}; remove from the network what it does not use"
        )
    missing = set(captured.state_dict()) - set(model.state_dict())
    if missing:
        raise CaptureError(
            f"capture changed the state-dict keys: {sorted(missing)[:3]}; please report this network"
        )
    captured.eval()
    with torch.no_grad():
        ours, theirs = captured(example), model.eval()(example)
    if not isinstance(theirs, Tensor):
        raise CaptureError(
            f"the network returns {type(theirs).__name__}; mixbits needs one tensor, the logits"
        )
    if not torch.equal(ours, theirs) and not torch.allclose(
        ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True
    ):
        worst = (ours - theirs).abs().max().item()
        raise CaptureError(
            f"the captured network differs from the model by {worst:g}; please report this network"
        )
