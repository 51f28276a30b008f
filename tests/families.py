"""Every model type of the installed transformers, patched against stock eager, as a table.

    python tests/families.py                 run all types (some 12 minutes of one core) and print a row each
    python tests/families.py --update [...]  run these types (default: all) and write their rows and docs/models.md
    python tests/families.py --oldest FILE   take the column of the oldest version from rows printed there
    python tests/families.py --render        write docs/models.md

timm, scipy, torchvision and torchaudio, where installed, let more types be built.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from family_calls import CALLS
from family_calls import candidates as input_candidates
from family_configs import build, candidates, configs, without_backends
from family_inputs import masks
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from hf_flash_mc.patches import patch_model, table, unpatch_model
from hf_flash_mc.patches.api import runs_here

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
SECONDS = 60  # of CPU time, for one model type


class Verdict(NamedTuple):
    model_type: str
    verdict: str  # a key of table.MEANING, or "wrong"
    reason: str = ""
    modules: int = 0
    reached: int = 0
    runs: str = ""


def tensors(out: Any) -> list[Tensor]:
    """The float tensors of an output, in order, nested ones too."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = [value for name, value in out.items() if "attentions" not in name]
    return [t for part in out for t in tensors(part)] if isinstance(out, (list, tuple)) else []


def outputs_and_gradients(model: nn.Module, path: str, inputs: dict[str, Any], rows: Tensor | None):
    """Output tensors (on the rows that count) of the part at ``path``, and the gradient of every parameter."""
    model.zero_grad()
    part = model.get_submodule(path)
    torch.manual_seed(0)
    out = tensors(part(**inputs))
    if rows is not None:
        out = [t[rows] for t in out if t.dim() >= 2 and t.shape[:2] == rows.shape]
    loss = torch.zeros(())
    for t in out:
        if t.requires_grad and t.numel() and t.isfinite().all():
            weight = torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).to(t.dtype)
            loss = loss + (t * weight).mean()
    if loss.requires_grad:
        loss.backward()
    return [t.detach() for t in out], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(got, expected) -> float:
    """Largest difference of outputs and gradients in units of the largest value (outputs: at least of 1)."""
    (out, grads), (ref, ref_grads) = got, expected
    worst = 0.0
    for a, b in zip(out, ref, strict=True):
        ok = b.isfinite()
        if a.shape != b.shape:
            return float("inf")
        if not torch.equal(a.isfinite(), ok):
            return float("inf")
        if ok.any():
            worst = max(worst, ((a - b)[ok].abs().max() / b[ok].abs().max().clamp(min=1)).item())
    if grads.keys() != ref_grads.keys():
        return float("inf")
    largest = max([g.abs().max().item() for g in ref_grads.values() if g.numel()], default=0.0)
    for name, grad in ((n, g) for n, g in grads.items() if g.numel()):
        worst = max(worst, (grad - ref_grads[name]).abs().max().item() / max(largest, 1e-20))
    return worst if worst == worst else float("inf")


def find_runs(model: nn.Module) -> tuple[list[tuple[str, dict[str, Any]]], int, set[str], str]:
    """(path, inputs) of calls that together reach the attention modules; how many there are, which are reached."""
    model = copy.deepcopy(model)  # reading some families' configs sets their attention implementation back
    attention = [n for n, m in model.named_modules() if runs_here(type(m))]
    reached: set[str] = set()
    hooks = [
        m.register_forward_pre_hook(lambda *_, n=n: reached.add(n))
        for n, m in model.named_modules()
        if n in set(attention)
    ]
    runs, error = [], ""
    parts = [n for n, m in model.named_modules() if isinstance(m, PreTrainedModel) or type(m).__name__ in CALLS]
    for path in parts:
        mine = {n for n in attention if not path or n.startswith(path + ".")}
        if path and not mine - reached:
            continue
        part = model.get_submodule(path)
        for count, inputs in enumerate(input_candidates(part)):
            if count and not mine - reached:
                break
            before = set(reached)
            try:
                torch.manual_seed(0)
                with torch.no_grad():
                    part(**copy.deepcopy(inputs))
            except Timeout:
                raise
            except Exception as e:
                error = f"{path}({', '.join(inputs)}): {type(e).__name__}: {e}"
                reached &= before
                continue
            if reached - before:
                runs.append((path, inputs))
            if not mine - reached:
                break
    for hook in hooks:
        hook.remove()
    return runs, len(attention), reached, error


class Timeout(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise Timeout


def short(error: Any) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return " ".join(text.split())[:300]


def attributes(model: nn.Module) -> dict[str, tuple]:
    """What unpatching brings back: class and attributes of every module (by identity), and configs by content."""
    return {
        name: (type(m), {k: (id(v), str(v)) if isinstance(v, PreTrainedConfig) else id(v) for k, v in vars(m).items()})
        for name, m in model.named_modules()
    }


def same_bits(got, expected) -> bool:
    """Whether outputs and gradients are bit-identical (NaN equals NaN)."""
    (out, grads), (ref, ref_grads) = got, expected
    pairs = [*zip(out, ref, strict=True), *((grads[n], ref_grads[n]) for n in grads.keys() & ref_grads.keys())]
    return (
        grads.keys() == ref_grads.keys()
        and all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs)
        and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    )


def finite(result) -> bool:
    """Whether stock has outputs and gradients for a padding: in float64 some models sum mask values to -inf and NaN."""
    out, grads = result
    return all(t.isfinite().all() for t in (*out, *grads.values()))


def compare(model: nn.Module, runs) -> tuple[dict[tuple[int, str], float], list[str]]:
    """Eager against patched over runs and paddings; the difference of each (run, padding) and what each is called.

    A model that was patched, run and unpatched must then give the bits of the one that never was: else a ValueError.
    """
    ours = copy.deepcopy(model)
    before = attributes(ours)
    if attributes(unpatch_model(patch_model(ours))) != before:
        raise ValueError("unpatching left something behind")
    patch_model(ours)
    differences, done, again = {}, [], []
    for number, (path, inputs) in enumerate(runs):
        part = model.get_submodule(path)
        for name, given, rows in masks(part, inputs):
            try:
                expected = outputs_and_gradients(model, path, copy.deepcopy(given), rows)
            except Timeout:
                raise
            except Exception:
                if name == "none":
                    raise
                continue  # it takes no such padding
            if rows is not None and not (expected[0] and finite(expected)):
                continue
            got = outputs_and_gradients(ours, path, copy.deepcopy(given), rows)
            differences[number, name] = difference(got, expected)
            done.append(f"{path}:{name}" if path else name)
            if model.config._attn_implementation != "eager":
                done[-1] += f"({model.config._attn_implementation})"
            if not expected[1]:
                done[-1] += "(no gradient)"
            if name in ("none", "causal"):
                again.append((path, given, rows, expected))
    unpatch_model(ours)
    for path, given, rows, expected in again:
        if not same_bits(outputs_and_gradients(ours, path, copy.deepcopy(given), rows), expected):
            raise ValueError("unpatched, the model differs from one that was never patched")
    return differences, done


def rounding(model: nn.Module, runs) -> dict[tuple[int, str], float]:
    """The errors of stock eager in float32 against float64, as `compare` measures differences."""
    double, errors = copy.deepcopy(model).double(), {}
    for number, (path, inputs) in enumerate(runs):
        for name, given, rows in masks(model.get_submodule(path), inputs):
            expected = outputs_and_gradients(double, path, to_double(given), rows)
            if rows is not None and not finite(expected):
                continue
            errors[number, name] = difference(outputs_and_gradients(model, path, copy.deepcopy(given), rows), expected)
    return errors


def classify(model_type: str) -> Verdict:
    found: list[Verdict] = []
    error: Any = None
    for cls in candidates(model_type)[:3]:
        for config in configs(model_type):
            if isinstance(config, Exception):
                error = error or config
                continue
            try:
                model = build(cls, config)
            except Timeout:
                raise
            except Exception as e:
                error = error or e
                continue
            verdict = judge(model_type, model)
            if verdict.verdict in ("exact", "wrong", "refused"):
                return verdict
            found.append(verdict)
    if found:
        best = max(found, key=lambda v: (v.verdict == "not run", v.reached))
        if best.verdict == "no attention" and attends_at_full_size(model_type):
            return Verdict(model_type, "not run", "the small models have no attention, but the stock one has")
        return best
    return Verdict(model_type, "not run" if error else "part", short(error) if error else "")


def attends_at_full_size(model_type: str) -> bool:
    """Whether a model of the stock config, built without memory, has attention on the interface."""
    for cls in candidates(model_type)[:3]:
        with contextlib.suppress(Exception), without_backends(cls), torch.device("meta"):
            if any(runs_here(type(m)) for m in cls(CONFIG_MAPPING[model_type]()).modules()):
                return True
    return False


def judge(model_type: str, model: nn.Module) -> Verdict:
    attention = sum(runs_here(type(m)) for m in model.modules())
    try:
        patch_model(copy.deepcopy(model))
    except NotImplementedError as error:
        return Verdict(model_type, "refused", short(str(error)), attention)
    except ValueError as error:
        if "nothing to patch" in str(error):
            return Verdict(model_type, "no attention", "")
        raise
    runs, modules, reached, error = find_runs(model)
    if len(reached) < modules or not modules:
        return Verdict(
            model_type, "not run", short(error or "no input found that reaches all attention"), modules, len(reached)
        )
    try:
        differences, done = compare(model, runs)
        worst = max(differences.values())
        large = {name: d for name, d in differences.items() if not d <= 1e-5}
        if large:
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the others have no float64
            double = compare(copy.deepcopy(model).double(), to_double(runs))[0]
            # rounding shrinks in float64 (to some 1e-5 where a model upcasts to float32 inside), an error does not
            large = {n: d for n, d in large.items() if not double.get(n, float("inf")) <= max(1e-5, d / 100)}
        if large:
            errors = rounding(model, runs)
            # of a padding that has none in float64, that of the same call without padding tells how much is rounding
            errors = {n: errors.get(n, errors.get((n[0], "none"), 0.0)) for n in large}
            large = {n: d for n, d in large.items() if not d / 2 <= errors[n] < float("inf")}
        if large:
            reason = "; ".join(
                f"{n[1]}: {d:.1e} from eager in float32, {double.get(n)} in float64" for n, d in large.items()
            )
            return Verdict(model_type, "wrong", short(reason), modules, len(reached), " ".join(done))
    except Timeout:
        raise
    except Exception as e:
        return Verdict(model_type, "wrong", short(e), modules, len(reached))
    return Verdict(model_type, "exact", f"{worst:.1e}", modules, len(reached), " ".join(done))


def to_double(x: Any) -> Any:
    """Floating-point tensors in float64, those in dicts, lists and objects (sessions) too."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: to_double(v) for k, v in x.items()}
    return type(x)(map(to_double, x)) if type(x) in (list, tuple) else x


def run(types: list[str]) -> Iterator[Verdict]:
    """The verdict on each type; a type that takes too long counts as not run."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, _alarm)
    for model_type in types:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            yield classify(model_type)
        except Timeout:
            yield Verdict(model_type, "not run", f"longer than {SECONDS} s")
        except Exception as error:
            yield Verdict(model_type, "not run", short(error))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def row(verdict: Verdict) -> table.Row:
    reason = "" if verdict.verdict == "exact" else verdict.reason
    route = table.route_of(verdict.model_type)
    return table.Row(
        verdict.model_type, verdict.verdict, route, verdict.modules, verdict.runs, reason, transformers.__version__
    )


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    action = arguments.pop(0) if arguments and arguments[0].startswith("--") else None
    known = dict(table.rows()) if action and table.FILE.exists() else {}
    if action == "--oldest":
        found = [json.loads(line) for line in Path(arguments[0]).read_text().splitlines()]
        for old in found:
            if old["model_type"] in known:
                known[old["model_type"]] = known[old["model_type"]]._replace(oldest=old["verdict"])
    elif action != "--render":
        for verdict in run(arguments or list(CONFIG_MAPPING_NAMES)):
            print(json.dumps(verdict._asdict()), flush=True)
            if action == "--update":
                oldest = known[verdict.model_type].oldest if verdict.model_type in known else ""
                known[verdict.model_type] = row(verdict)._replace(oldest=oldest)
    if action:
        table.write(list(known.values()))
        DOCS.write_text(table.markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
