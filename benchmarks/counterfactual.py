"""Time of scoring V edits of a working context, against V full forwards and against an expanded cache.

python -m benchmarks.counterfactual --shape 135m 3b      # on a GPU: V = 16, P = 8192, S = 128
python -m benchmarks.counterfactual --shape tiny --prefix 256 --suffix 8 --variants 4 --dtype float32

A working context of P slots, of which V are gists, on a random Llama-shaped model. Each variant expands one gist, and
the losses of the next S tokens are wanted. Before anything is timed, the losses are compared with exact ones: those of
stock transformers with eager attention in float32, over the very keys of the edited working context. In half precision
the scorer's error may exceed that of a session to which the edits are applied one after another by a fifth at most in
its root mean square, and be twice as large in its maximum, as in the tests; in float32 it has a bound of its own.

- ours: `CounterfactualScorer`: keys shared by all variants are read once.
- session: apply, run, and undo each edit.
- full, full-sdpa: a forward over all P + S tokens, with our attention and with stock sdpa, times V.
- expanded-sdpa: stock transformers: one forward of V rows of S tokens over a cache of P keys repeated V times.

Kernels are compiled first, in parallel processes. The file is written anew after each line.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure import record, timing
from hf_flash_mc.measure.warm import in_parallel
from hf_flash_mc.megacontext import CounterfactualScorer, Edits
from hf_flash_mc.megacontext.attach import cache_argument
from hf_flash_mc.megacontext.evaluate import target_losses

BLOCK, RECENT = 32, 64
SHAPES = {  # hidden size, MLP, layers, query and KV heads, vocabulary
    "tiny": (64, 96, 2, 4, 2, 97),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "3b": (2048, 11008, 36, 16, 4, 128256),
}
TOLERANCE = 1e-3  # nats of one token's loss in float32
RMS_RATIO, MAX_RATIO = 1.2, 2.0  # of the scorer's error to the edited session's, in half precision
SAMPLES = 5
COMPILING = 120.0  # seconds; what is not compiled by then is when it is needed
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    device = torch.device(options.device)
    given = sys.argv[1:] if arguments is None else arguments
    method = f"median, p20 and p80 of {SAMPLES} samples; checked before timing"
    run = record.describe_command(device, ["python", "-m", "benchmarks.counterfactual"], given, method, options.dtype)
    if device.type == "cuda":
        jobs = {f"{shape}, {part}": (shape, part, options) for shape in options.shape for part in PARTS}
        in_parallel("compiling", run_part, jobs, COMPILING)
    rows = (row for shape in options.shape for row in measure(shape, options, device))
    record.keep(rows, run, options.out, _shown)
    return 0


def _shown(row: Row) -> str:
    time, times = row["median_ms"], row["times_ours"]
    return f"{row['shape']:>5} {row['implementation']:<14} {time:9.2f} ms {times:6.1f} x ours"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["135m"])
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=8192, help="slots of the working context")
    parser.add_argument("--suffix", type=int, default=128, help="tokens whose loss is wanted")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args(arguments)


def measure(shape: str, options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Check, then time, every way for one shape of model."""
    count, suffix = options.variants, options.suffix
    model = random_model(shape, slots_of(options), getattr(torch, options.dtype), device)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    case = prepare(model, options)
    wanted, theirs = edited_losses(case, exact)
    assert wanted is not None
    del exact  # its room is needed
    errors = check(case.ours() - wanted, theirs - wanted, options.dtype)
    head = {"shape": shape, "variants": count, "prefix": options.prefix, "suffix": suffix, "dtype": options.dtype}
    base = 0.0

    def timed(name: str, call: Callable[[], Any], times: int = 1, warmup: int = 1) -> Row:
        with torch.no_grad():
            found = timing.spread(call, device, SAMPLES, warmup)
        found = {key: time * times for key, time in found.items()}
        median = found["median_ms"]
        return {**head, **errors, "implementation": name, **found, "times_ours": median / (base or median)}

    first = timed("ours", case.ours, warmup=0)  # both ran for the check
    base = first["median_ms"]
    yield first
    yield timed("session", lambda: edited_losses(case), warmup=0)
    yield timed("full", case.full, count)
    with model.megacontext.disable():
        yield timed("full-sdpa", case.full, count)
        yield timed("expanded-sdpa", expanded_call(model, case.whole, count, suffix))


@dataclass
class Case:
    """A model with a working context, and what is asked of it."""

    model: Any
    session: Any
    scorer: CounterfactualScorer
    variants: list[Edits]
    targets: Tensor
    whole: Tensor  # [1, P + S]

    def ours(self) -> Tensor:
        """Losses [V, S]."""
        return self.scorer.losses(self.variants, self.targets, batch=len(self.variants))

    def full(self) -> Any:
        """A forward over everything, for one variant."""
        return self.model(self.whole, logits_to_keep=len(self.targets), use_cache=False)


def slots_of(options: argparse.Namespace) -> int:
    """Of the working context, with room for what is expanded and read."""
    return options.prefix + 2 * options.suffix + BLOCK * options.variants


def prepare(model: Any, options: argparse.Namespace) -> Case:
    """Read a history of which ``--variants`` blocks become gists, to be expanded by a variant each."""
    count, prefix, slots = options.variants, options.prefix, slots_of(options)
    config = MegaContextConfig(block_size=BLOCK, w_max=slots, recent_tokens=RECENT, lens={"kind": "gist_mass"})
    attach_megacontext(model, config)
    vocabulary = model.config.vocab_size
    history = torch.randint(vocabulary, (prefix + (BLOCK - 1) * count,), generator=torch.Generator().manual_seed(1))
    session = model.megacontext.session(observe=0)
    session.ingest(history)
    starts = BLOCK + BLOCK * torch.arange(count) * max(1, (len(history) - RECENT - 2 * BLOCK) // (BLOCK * count))
    session.apply(Edits.of([(-1, int(start), 1) for start in starts]))
    ids = torch.randint(vocabulary, (prefix + options.suffix,), generator=torch.Generator().manual_seed(0))
    variants = [Edits.of([(1, int(start), 1)]) for start in starts]
    targets, whole = ids[: options.suffix], ids[None].to(model.device)
    return Case(model, session, CounterfactualScorer(session), variants, targets, whole)


PARTS: dict[str, Callable[[Case], Any]] = {
    "ours": Case.ours,
    "session": lambda case: edited_losses(replace(case, variants=case.variants[:1])),
    "full": Case.full,
}


def run_part(job: tuple[str, str, argparse.Namespace]) -> None:
    """One way, once, through one layer: its kernels are those of all layers."""
    shape, part, options = job
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    with torch.no_grad():
        PARTS[part](prepare(random_model(shape, slots_of(options), dtype, device, layers=1), options))


def random_model(
    shape: str, positions: int, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> Any:
    """A Llama-shaped model with random weights, of all layers or of some."""
    hidden, mlp, every, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers or every,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config).to(dtype).eval()


def expanded_call(model: Any, whole: Tensor, count: int, suffix: int) -> Callable[[], Any]:
    """What stock transformers offers: the last tokens ``count`` times over a cache that was repeated as often."""
    prefix = whole.shape[1] - suffix
    rows = whole[:, prefix:].expand(count, -1)
    with torch.no_grad():
        held = DynamicCache(config=model.config)
        model(whole[:, :prefix], logits_to_keep=1, use_cache=True, **{cache_argument(model): held})

    def expanded() -> Any:
        pairs = [[x.repeat_interleave(count, 0) for x in (layer.keys, layer.values)] for layer in held.layers]
        return model(rows, logits_to_keep=suffix, use_cache=True, **{cache_argument(model): filled(model, pairs)})

    return expanded


def filled(model: Any, pairs: list[list[Tensor]]) -> DynamicCache:
    """transformers' own cache with these keys and values of each layer."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        layer.keys, layer.values, layer.is_initialized = keys, values, True
    return cache


def edited_losses(case: Case, exact: Any = None) -> tuple[Tensor | None, Tensor]:
    """Losses [V, S] by editing the session itself; before them those of the model ``exact`` after the same edits."""
    session, found, wanted = case.session, [], []
    before = session.working_context.copy()
    for edits in case.variants:
        session.apply(edits)
        found.append(torch.from_numpy(target_losses(session, case.targets)))
        if exact is not None:
            wanted.append(exact_losses(session, exact, case.targets))
        session.restore(before)
    return torch.stack(wanted) if wanted else None, torch.stack(found)


@torch.no_grad()
def exact_losses(session: Any, exact: Any, targets: Tensor) -> Tensor:
    """Losses [S] of a stock float32 model over a session's keys; its gists weigh what a key weighs (beta 0)."""
    held = session.cache.read(session.memory.slots[:-1]).permute(1, 2, 3, 0, 4).float()  # [L, 2, Hkv, n, D]
    cache = filled(exact, [[layer[:1], layer[1:]] for layer in held])
    ids = torch.cat((session.tokens(-1), targets[:-1]))[None].to(exact.device)
    first = int(session.memory.numbering.position[-1])
    places = torch.arange(first, first + len(targets), device=exact.device)[None]
    logits = exact(ids, position_ids=places, use_cache=True, **{cache_argument(exact): cache}).logits[0]
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()


def check(ours: Tensor, session: Tensor, dtype: str) -> dict[str, float]:
    """Both errors [V, S] in nats, as columns of a row; SystemExit where the scorer's is more than rounding explains."""
    rms = [float(error.double().square().mean().sqrt()) for error in (ours, session)]
    most = [float(error.abs().max()) for error in (ours, session)]
    exact = dtype == "float32"
    fits = most[0] <= TOLERANCE if exact else rms[0] <= RMS_RATIO * rms[1] and most[0] <= MAX_RATIO * most[1]
    found = dict(zip(("rms_error", "session_rms_error", "max_error", "session_max_error"), rms + most, strict=True))
    if not fits:
        raise SystemExit(f"wrong: losses differ from exact ones by more than rounding: {found} nats")
    return found


if __name__ == "__main__":
    sys.exit(main())
