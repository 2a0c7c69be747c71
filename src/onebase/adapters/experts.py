"""LoRA on bare parameters (`target_parameters`): the stacked experts of mixture-of-experts models, and plain matrices.

    W_e + s * B_e A_e for every expert e

A parameter is (experts, out, in), or (experts, in, out) in modules that say `is_transposed`; a matrix is one expert.
Trained are lora_A (r * experts, in) and lora_B (out, r * experts), as PEFT stores them: A's rows lie expert by expert, in
B's columns the experts are innermost. Tokens are spread over experts inside the module, so nothing can be added beside
it: for the rows of its adapter the frozen module runs with the sums in the place of its parameters. Cost: each forward
makes the sum, and each backward its gradient, as large as the parameter, once for each adapter in the batch. Dropout
would act on inputs that are not seen here, and is refused, as are DoRA and starts from the base.

Where one module has several such parameters PEFT wraps it once for each, the last one outermost, and the names say so:
`experts.lora_A` is the last one's, `experts.base_layer.lora_A` that before it. Source: PEFT, ParamWrapper.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.copies import WithTensors
from onebase.adapters.pair import PairPlan, initialise_
from onebase.adapters.part import RowCall
from onebase.adapters.places import Places
from onebase.errors import TargetError, list_problems


@dataclass(frozen=True, eq=False)
class ParameterPair:
    """The pair of one parameter of a module: A is (r * experts, in), B is (out, r * experts), both fp32."""

    name: str
    prefix: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    experts: int
    transposed: bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (left, right) with scaling * left @ right what is added, stacked as the parameter is."""
        A = self.A.view(self.experts, -1, self.A.shape[1])  # (experts, r, in)
        B = self.B.view(self.B.shape[0], -1, self.experts).permute(2, 0, 1)  # (experts, out, r)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def added_to(self, weight: Tensor) -> Tensor:
        """Return the parameter with its update, in its own dtype."""
        left, right = (factor.to(weight.dtype) for factor in self.factors())
        if weight.dim() == 2:
            return torch.addmm(weight, left[0], right[0], alpha=self.scaling)
        return torch.baddbmm(weight, left, right, alpha=self.scaling)


@dataclass(frozen=True, eq=False)
class ExpertsPart:
    """One adapter's pairs on the parameters of one module."""

    path: str
    pairs: tuple[ParameterPair, ...]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors under PEFT's names."""
        for pair in self.pairs:
            yield f"{pair.prefix}.lora_A.weight", pair.A
            yield f"{pair.prefix}.lora_B.weight", pair.B

    def instead(self, call: RowCall) -> Any:
        """Return what the module makes of the rows with the updates in its parameters."""
        module = call.module
        sums = {pair.name: pair.added_to(module.get_parameter(pair.name)) for pair in self.pairs}
        return call.run(WithTensors(module, sums))

    @torch.no_grad()
    def merge_(self, module: nn.Module) -> None:
        """Add the updates to the parameters of a copy of the module, in fp32 at least."""
        for pair in self.pairs:
            weight = module.get_parameter(pair.name)
            wide = torch.promote_types(weight.dtype, pair.A.dtype)
            weight.copy_(pair.added_to(weight.to(wide)))


def choose_parameters(places: Places, patterns: Sequence[str], taken: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters that `target_parameters` names, by the path of their module, in the model's order.

    Args:
        taken: the targets, which have a pair of their own.

    Raises:
        TargetError: a name that matches nothing, or what cannot have a pair.
    """
    known = {
        f"{path}.{name}": (path, name, parameter)
        for path, module in places.modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    problems, chosen = [], set()
    for pattern in patterns:
        found = [key for key in known if key == pattern or key.endswith("." + pattern)]
        chosen.update(found)
        if not found:
            problems.append(f"adapter.target_parameters: {pattern!r} matches no parameter; {_closest(pattern, known)}")
        wrong = [key for key in found if not _can_have_pair(known[key][2])]
        problems += [
            f"adapter.target_parameters: {key} has shape {tuple(known[key][2].shape)}; LoRA goes on matrices and on stacks of "
            "them (3-D). Name those alone."
            for key in wrong[:1]
        ]
        both = [key for key in found if known[key][0] in taken]
        problems += [
            f"adapter.target_parameters: {key} belongs to {known[key][0]}, which is a target already. Leave it out here, or "
            "there (adapter.exclude_modules)."
            for key in both[:1]
        ]
    if problems:
        raise TargetError(list_problems("adapter", problems))
    modules: dict[str, list[str]] = {}
    for key, (path, name, _) in known.items():
        if key in chosen:
            modules.setdefault(path, []).append(name)
    return modules


def make_experts(
    path: str, names: Sequence[str], places: Places, plan_of: Callable[[str], PairPlan]
) -> tuple[ExpertsPart, list[tuple[PairPlan, tuple[int, int]]]]:
    """Return new pairs for parameters of one module, and each one's plan with its (outputs, inputs)."""
    module, pairs, planned = places.module(path), [], []
    for number, name in enumerate(names):
        plan, weight = plan_of(f"{path}.{name}"), module.get_parameter(name)
        transposed = weight.dim() == 3 and bool(getattr(module, "is_transposed", False))
        outputs, inputs = weight.shape[-2:][::-1] if transposed else weight.shape[-2:]
        experts = 1 if weight.dim() == 2 else int(weight.shape[0])
        lora_A, lora_B = torch.empty(plan.r * experts, inputs), torch.zeros(outputs, plan.r * experts)
        initialise_(lora_A, lora_B, plan.init, plan.r, plan.generator())
        A, B = (nn.Parameter(tensor.to(weight.device)) for tensor in (lora_A, lora_B))
        prefix = path + ".base_layer" * (len(names) - 1 - number)
        pairs.append(ParameterPair(name, prefix, A, B, plan.scaling, experts, transposed))
        planned.append((plan, (int(outputs), int(inputs))))
    return ExpertsPart(path, tuple(pairs)), planned


def pair_width(weight: Tensor) -> int:
    """Return how many numbers a parameter's pair has for each number of its rank."""
    return weight.shape[:-2].numel() * sum(weight.shape[-2:])


def _can_have_pair(parameter: Tensor) -> bool:
    return parameter.dim() in (2, 3) and parameter.is_floating_point()


def _closest(pattern: str, known: Mapping[str, tuple[str, str, Tensor]]) -> str:
    """Return which parameter was perhaps meant, or those that are stacked."""
    named = {f"{path.rpartition('.')[2]}.{name}": tensor for path, name, tensor in known.values()}
    close = difflib.get_close_matches(pattern, list(named), 1, 0.6)
    if close:
        return f"closest is {close[0]!r}."
    stacked = sorted(key for key, tensor in named.items() if tensor.dim() == 3)
    return f"stacked ones here are {', '.join(stacked)}." if stacked else "this model has no stacked ones."
