"""A network as an ordered list of named stages, from "stem" to "head": the scale on which freezing is decided.

Every parameter and buffer belongs to exactly one stage. timm's models bring their own grouping; all others are cut by
one rule:

1. The children of the root are taken in order; the body containers (`features`, `layers`, `encoder` …) are opened.
2. A child with several weight tensors (a residual block, a transformer layer) is a stage.
3. Children with a single one (a convolution, with or without its norm and activation) run together into a stage,
   which ends at a pooling layer or before a child of kind 2. So AlexNet and VGG fall into their blocks.
4. A child without weight tensors (activation, norm, pooling) joins the stage before it.
5. What stands between body and output layer (VGG's fully-connected layers) is the stage "hidden".

A weight tensor is one of two dimensions or more, which sets kernels and matrices apart from biases and norms.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from torch import Tensor, nn

from finetune.models.heads import head_layers

BODY_CONTAINERS = frozenset(
    {
        "features",
        "layers",
        "blocks",
        "stages",
        "dense_stages",
        "transformers",
        "trunk_output",
        "encoder",
        "encoder.layers",
    }
)
"""Paths under which torchvision and timm keep the body of a network."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a network.

    `modules` are the paths of the largest modules that lie wholly in the stage, in order; modules without tensors
    (dropout, pooling) belong to the stage before them. `tensors` are the paths of parameters and buffers whose owner
    spans several stages, such as a class token. `is_body` is false for "hidden" and "head", which come after the
    convolutional (or transformer) body.
    """

    name: str
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    is_body: bool


@dataclass(kw_only=True)
class _Group:
    """A stage under construction: the names of its parameters, and its own name where the parts suggest one."""

    parameters: list[str]
    name: str = ""
    is_body: bool = True


def find_stages(model: nn.Module) -> tuple[Stage, ...]:
    """Cut `model` into stages, in the order in which an image passes them.

    The first is called "stem" and the last, which holds the output layers alone, "head". The others carry the path of
    their module, or "blockN" for the N-th stage where several modules make it up.
    """
    heads = head_layers(model)
    in_head = [name for name, _ in model.named_parameters() if _is_below(name, heads)]
    grouped = _timm_groups(model, heads, in_head) or _module_groups(model, heads, in_head)
    groups = [*filter(lambda group: group.parameters, grouped), _Group(parameters=in_head, name="head", is_body=False)]
    if len(groups) > 1:  # a linear classifier on pixels is all head
        groups[0].name = "stem"
    _name_the_rest(groups)
    return _place_modules(model, groups, heads)


def stage_tensors(model: nn.Module, stage: Stage) -> dict[str, Tensor]:
    """Return the parameters and buffers of `stage` by name."""
    everything: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor for name, tensor in everything.items() if name in stage.tensors or _is_below(name, stage.modules)
    }


def stage_parameters(model: nn.Module, stage: Stage) -> dict[str, nn.Parameter]:
    """Return the parameters of `stage` by name."""
    tensors = stage_tensors(model, stage)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def count_stage_parameters(model: nn.Module, stage: Stage) -> int:
    """Count the parameters of `stage`, learning or frozen."""
    return sum(parameter.numel() for parameter in stage_parameters(model, stage).values())


def _timm_groups(model: nn.Module, heads: list[str], in_head: list[str]) -> list[_Group]:
    """Group the parameters as timm does, or return nothing for the few models without a coarse grouping.

    timm counts everything behind the body to the last group. There a norm goes back to the stage before it, layers
    beside the output layer become "hidden", and other convolutions a stage of the body.
    """
    if not hasattr(model, "group_matcher"):
        return []
    from timm.models import group_parameters

    try:
        members = group_parameters(model, cast(Any, model).group_matcher(coarse=True))
    except AssertionError:  # RDNet asserts that nobody asks for the coarse grouping
        return []
    *body, last = ([name for name in members[place] if name not in in_head] for place in sorted(members))
    groups = [_Group(parameters=names) for names in body]
    beside_head = ["pre_logits", *(head.split(".")[0] for head in heads if "." in head)]
    hidden = [name for name in last if _is_below(name, beside_head)]
    neck = [name for name in last if name not in hidden]
    for names, part in (
        (neck, _Group(parameters=neck)),
        (hidden, _Group(parameters=hidden, name="hidden", is_body=False)),
    ):
        if _weight_tensors(model, names):
            groups.append(part)
        else:
            groups[-1].parameters += names
    for group in groups:
        group.name = group.name or _common_path(_weight_tensors(model, group.parameters))
    return groups


def _module_groups(model: nn.Module, heads: list[str], in_head: list[str]) -> list[_Group]:
    """Group the parameters by the rule at the top of this file."""
    groups: list[_Group] = []
    may_grow = False
    for path, module in _units(model):
        names = [name for name, _ in module.named_parameters(prefix=path) if name not in in_head]
        weights = _weight_tensors(model, names)
        if weights and _is_below(heads[0], [path]):
            groups.append(_Group(parameters=names, name="hidden", is_body=False))
        elif not groups or len(weights) > 1 or (weights and not may_grow):
            groups.append(_Group(parameters=names, name=path if list(module.children()) else ""))
        else:
            groups[-1].parameters += names
            groups[-1].name = "" if weights else groups[-1].name
        may_grow = (len(weights) == 1 or (may_grow and not weights)) and not _has_pooling(module)
    # Tokens and position embeddings that hang on the root or on an opened container enter at the bottom.
    placed = {name for group in groups for name in group.parameters}.union(in_head)
    groups[0].parameters += [name for name, _ in model.named_parameters() if name not in placed]
    return groups


def _units(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of the root in order, with the body containers opened."""
    for name, child in model.get_submodule(path).named_children():
        child_path = f"{path}.{name}" if path else name
        if child_path in BODY_CONTAINERS:
            yield from _units(model, child_path)
        else:
            yield child_path, child


def _name_the_rest(groups: Sequence[_Group]) -> None:
    """Call a group "blockN" by its place where it has no name, or one that is taken."""
    taken = {"head"}
    for place, group in enumerate(groups[:-1], start=1):
        if not group.name or group.name in taken:
            group.name = f"block{place}"
        taken.add(group.name)


def _place_modules(model: nn.Module, groups: Sequence[_Group], heads: Sequence[str]) -> tuple[Stage, ...]:
    """Give every module and buffer to the stage of the parameters it holds, or else to the one before it."""
    # By identity, because a few networks reach one parameter by two paths.
    stage_of = {id(model.get_parameter(name)): index for index, group in enumerate(groups) for name in group.parameters}
    modules: list[list[str]] = [[] for _ in groups]
    tensors: list[list[str]] = [[] for _ in groups]
    current = 0

    def place(path: str, module: nn.Module) -> None:
        nonlocal current
        inside = {stage_of[id(parameter)] for parameter in module.parameters()}
        # What holds an output layer is opened too, so that the dropout before that layer is not taken for the head.
        if len(inside) <= 1 and not any(head != path and _is_below(head, [path]) for head in heads):
            current = next(iter(inside), current)
            modules[current].append(path)
            return
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            tensors[stage_of[id(parameter)]].append(name)
        tensors[current] += [name for name, _ in module.named_buffers(prefix=path, recurse=False)]
        for name, child in module.named_children():
            place(f"{path}.{name}" if path else name, child)

    place("", model)
    return tuple(
        Stage(name=group.name, modules=tuple(paths), tensors=tuple(names), is_body=group.is_body)
        for group, paths, names in zip(groups, modules, tensors, strict=True)
    )


def _weight_tensors(model: nn.Module, names: Iterable[str]) -> list[str]:
    return [name for name in names if model.get_parameter(name).ndim > 1]


def _has_pooling(module: nn.Module) -> bool:
    return any(type(part).__module__ == "torch.nn.modules.pooling" for part in module.modules())


def _is_below(name: str, paths: Iterable[str]) -> bool:
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)  # "" is the root


def _common_path(names: Sequence[str]) -> str:
    """Return the path of the module that holds all of `names`, or "" where that is the root or a body container."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
    return "" if path in BODY_CONTAINERS else path
