"""``impl="auto"`` on a GPU: the Hopper kernels where they run and are the faster ones, else the portable kernels.

Decided call by call below the op, so that compiled and exported programs choose on the GPU they run on. What "auto"
is on a device, api.py says (``_AUTO``); which portable kernels take a call, portable/shapes.py (``choose``).
"""

from __future__ import annotations

from torch import Tensor

from . import repeat
from .portable import launch as portable
from .portable import shapes
from .portable.launch import _on_device
from .portable.plan import Plan, plan_of
from .spec import Gradients, Needs, Spec, Varlen
from .tuning import architecture

unsupported = portable.unsupported  # what neither takes
FEW = 64  # query rows or keys, up to which most of a Hopper tile would be padding
SMALL = 128  # rows of a KV head, and keys, up to which the portable kernels make one launch each way


def choose(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> tuple[str, list[str]]:
    """("hopper" or "triton", why not hopper)."""
    if architecture(q.device) != "sm90":
        return "triton", []
    reasons = _why_not_hopper(plan_of(q, k, v, spec, varlen), q, k, v, spec, varlen)
    return ("triton" if reasons else "hopper"), reasons


def _why_not_hopper(plan: Plan, q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None) -> list[str]:
    """Kept with the plan: everything looked at is part of a plan's key."""
    reasons = plan.launches.get("auto")
    if reasons is None:
        from .hopper.launch import unsupported as unsupported_by_hopper

        reasons = unsupported_by_hopper(q, k, v, spec, varlen)
        if min(plan.max_q, plan.max_k) <= FEW:
            reasons.append(f"at most {FEW} query rows or keys: the portable kernels waste less of a tile")
        elif _is_small(plan, q):
            reasons.append(f"at most {SMALL} rows and keys on few heads: one launch of the portable kernels for three")
        if max(plan.d, plan.dv) <= 32:
            reasons.append("head dims up to 32: the portable kernels waste less of a tile")
        plan.launches["auto"] = reasons
    return reasons


def _is_small(plan: Plan, q: Tensor) -> bool:
    """Whether all of a call runs at once, by one launch each way: then it takes no longer than the host does."""
    from .hopper.programs import multiprocessors

    return (
        shapes.choose(plan, "fwd") == shapes.choose(plan, "bwd") == "few_keys"
        and max(plan.sq * (plan.hq // plan.hkv), plan.sk) <= SMALL
        and plan.batch * plan.hkv <= multiprocessors(q.device)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> tuple[Tensor, Tensor]:
    """out and lse."""
    plan = plan_of(q, k, v, spec, varlen)
    if plan.arch == "sm90" and not _why_not_hopper(plan, q, k, v, spec, varlen):
        return _hopper_forward(q, plan, k, v, spec, varlen)
    return portable.forward(q, k, v, spec, varlen, None, plan)


def Call(q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec) -> repeat.Call:  # a constructor, as in the others
    """What ``repeat`` keeps of the call: that of the back end which it chose."""
    if choose(q, k, v, spec)[0] == "triton":
        return portable.Call(q, k, v, impl, spec)
    from .hopper.launch import Call

    return Call(q, k, v, impl, spec)


@_on_device
def _hopper_forward(
    q: Tensor, plan: Plan, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None
) -> tuple[Tensor, Tensor]:
    from .hopper.launch import run_forward

    return run_forward(plan, q, k, v, spec, varlen)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec,
    needs: Needs, deterministic: bool, varlen: Varlen | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names."""
    if choose(q, k, v, spec, varlen)[0] == "hopper":
        from .hopper import launch as hopper

        return hopper.backward(dout, dlse, q, k, v, out, lse, spec, needs, deterministic, varlen)
    return portable.backward(dout, dlse, q, k, v, out, lse, spec, needs, deterministic, varlen)
