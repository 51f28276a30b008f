"""The main job: a real pretrained model, patched in one line, against stock transformers on real text.

    python examples/quickstart.py                  # SmolLM2-135M from a Python package
    python examples/quickstart.py --model FOLDER   # any causal language model that from_pretrained reads

Prints a table and ends with exit code 1 if a check fails. On a CPU the model runs in float32 and the reference is stock
eager attention; on a GPU it runs in bfloat16 and the reference is stock eager attention in float32, from which the
patched model may be no further than twice as far as stock bfloat16 is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from measure import call_cost, compile_counts, device_name, missing_compiler
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_flash_mc import explain_attention, patch_model, patch_report

# Relative to the largest logit and to the NLL. float32: rounding alone makes stock eager and stock sdpa differ by 2e-6,
# and NLL equal to four digits. bfloat16: added to twice the distance of stock bfloat16 from float32.
LOGIT_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
NLL_TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-3}
PROMPT = "Explain in a few sentences why the sky is blue."
COMPILED_TOKENS = 512
console = Console()


@dataclass
class Reading:
    """What one way of running the model gives on the text: logits [S, V] in float32, mean NLL, greedy tokens [n]."""

    logits: Tensor
    nll: float
    tokens: Tensor


@dataclass
class Row:
    """A line of the table; ``passed`` is None where nothing is required or nothing could be run."""

    name: str
    stock: str
    patched: str
    required: str = ""
    passed: bool | None = None


def main() -> int:
    """Run all checks; the process's exit code."""
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    folder, name = find_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = step("loading the model", lambda: load(folder, dtype, device))
    text = text_tokens(tokenizer, model, options.tokens).to(device)
    prompt = prompt_tokens(tokenizer).to(device)
    console.print(
        f"[bold]{name}[/bold] on {device_name(device)}, {str(dtype)[6:]}; "
        f"text: {text.shape[1]} tokens of Python's language reference"
    )
    exact = None
    if dtype != torch.float32:
        exact = step("stock float32: loading", lambda: load(folder, torch.float32, device))
    rows = compare(model, exact, text, prompt, options)
    console.print(table_of(rows))
    console.print(f"{patch_report(model)}\n\n{explain(model, text.shape[1], dtype, device)}", highlight=False)
    failed = [row.name for row in rows if row.passed is False]
    console.print(f"[bold red]FAILED: {', '.join(failed)}" if failed else "[bold green]All checks passed.")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of text for logits and NLL (default 2048)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate greedily (default 64)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, the slowest check")
    return parser.parse_args()


def step(title: str, work: Callable[[], Any]) -> Any:
    """Run ``work``, say so and how long it took: progress that reads well on a screen and in a log."""
    console.print(f"  {title} ...", end=" ")
    start = time.perf_counter()
    result = work()
    console.print(f"{time.perf_counter() - start:.1f} s", highlight=False)
    return result


def find_model(given: str | None) -> tuple[str, str]:
    """What ``from_pretrained`` is to read, and what to call it."""
    if given is not None:
        return given, given
    from smollm2 import NAME, smollm2_folder

    return str(step("SmolLM2 (93 MB, downloaded and converted once)", smollm2_folder)), NAME


def load(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.to(device).eval()


def text_tokens(tokenizer: Any, model: Any, count: int) -> Tensor:
    """[1, count] tokens of prose that ships with Python, in a fixed order; fewer if the model's context is shorter."""
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    count = min(count, getattr(model.config, "max_position_embeddings", None) or count)
    ids = tokenizer(prose[: 20 * count], return_tensors="pt", truncation=True, max_length=count).input_ids
    if ids.shape[1] < count:
        raise SystemExit(f"quickstart: --tokens {count} is more than the text has; it gives {ids.shape[1]}")
    return ids


def prompt_tokens(tokenizer: Any) -> Tensor:
    """[1, n] tokens of the prompt, in the model's chat format if it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(PROMPT, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": PROMPT}]
    return tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids


def compare(model: Any, exact_model: Any, text: Tensor, prompt: Tensor, options: argparse.Namespace) -> list[Row]:
    """The table: every figure both ways. ``model`` comes with stock eager attention and leaves patched."""
    costs, new_tokens = {}, options.new_tokens
    stock = step("stock eager: logits, NLL, greedy tokens", lambda: read(model, text, prompt, new_tokens))
    costs["eager"] = step("stock eager: time and memory", lambda: forward_cost(model, text))
    model.set_attn_implementation("sdpa")
    costs["sdpa"] = step("stock sdpa: time and memory", lambda: forward_cost(model, text))
    model.set_attn_implementation("eager")
    model = patch_model(model)
    patched = step("patched: logits, NLL, greedy tokens", lambda: read(model, text, prompt, new_tokens))
    costs["patched"] = step("patched: time and memory", lambda: forward_cost(model, text))
    if exact_model is None:
        exact_model, exact = None, stock
    else:
        exact = step("stock float32: logits, NLL", lambda: read(exact_model, text, prompt, 1))
    rows = [logit_row(stock, patched, exact, model.dtype), nll_row(stock, patched, exact, model.dtype)]
    rows.append(token_row(stock, patched, exact_model, prompt, logit_bound(stock, exact, model.dtype)))
    lacking = "left out" if options.no_compile else missing_compiler(text.device)
    rows.append(compiled_row(model, text[:, :COMPILED_TOKENS], logit_bound(stock, exact, model.dtype), lacking))
    return rows + cost_rows(costs, text.shape[1])


@torch.no_grad()
def read(model: Any, text: Tensor, prompt: Tensor, new_tokens: int) -> Reading:
    logits = model(text, use_cache=False).logits[0].float()
    nll = F.cross_entropy(logits[:-1], text[0, 1:]).item()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return Reading(logits, nll, out[0, prompt.shape[1] :])


@torch.no_grad()
def forward_cost(model: Any, text: Tensor) -> tuple[float, float | None]:
    """Seconds and extra peak MiB of a forward over the text without the language-model head, which hides the rest."""
    return call_cost(lambda: model.base_model(text, use_cache=False), text.device)


def logit_bound(stock: Reading, exact: Reading, dtype: torch.dtype) -> float:
    """How far the patched model's logits may be from the reference."""
    return 2 * distance(stock, exact) + LOGIT_TOLERANCE[dtype] * exact.logits.abs().max().item()


def distance(reading: Reading, exact: Reading) -> float:
    return (reading.logits - exact.logits).abs().max().item()


def logit_row(stock: Reading, patched: Reading, exact: Reading, dtype: torch.dtype) -> Row:
    largest, error, bound = exact.logits.abs().max().item(), distance(patched, exact), logit_bound(stock, exact, dtype)
    ours, theirs = f"{error / largest:.1e} ({error:.1e} of {largest:.0f})", f"{distance(stock, exact) / largest:.1e}"
    required = f"at most {bound / largest:.1e}"
    return Row("logits: error / largest", theirs, ours, required, error <= bound)


def nll_row(stock: Reading, patched: Reading, exact: Reading, dtype: torch.dtype) -> Row:
    bound = 2 * abs(stock.nll - exact.nll) + NLL_TOLERANCE[dtype] * exact.nll
    required = "equal to 4 digits" if stock is exact else f"{exact.nll:.5f} within {bound:.0e}"
    passed = abs(patched.nll - exact.nll) <= bound
    return Row(f"mean NLL of {len(exact.logits)} tokens", f"{stock.nll:.5f}", f"{patched.nll:.5f}", required, passed)


@torch.no_grad()
def token_row(stock: Reading, patched: Reading, exact_model: Any, prompt: Tensor, bound: float) -> Row:
    """float32: the same tokens. bfloat16: tokens that the float32 model ranks first, but for logits' rounding."""
    same = int((stock.tokens == patched.tokens).cumprod(0).sum())
    name, count = f"{len(stock.tokens)} greedy tokens", len(stock.tokens)
    if exact_model is None:
        return Row(name, "", f"{same} equal", "all equal", same == count)
    sequence = torch.cat([prompt[0], patched.tokens])[None]
    ranked = exact_model(sequence, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    gap = (ranked.amax(-1) - ranked.gather(-1, patched.tokens[:, None])[:, 0]).max().item()
    shown = f"first {same} as stock; {gap:.1e} below the top"
    return Row(name, "", shown, f"top by float32, within {2 * bound:.1e}", gap <= 2 * bound)


@torch.no_grad()
def compiled_row(model: Any, text: Tensor, bound: float, lacking: str | None) -> Row:
    """torch.compile with fullgraph=True: one graph, no break, logits within the bound; not run if something lacks."""
    name = "torch.compile, fullgraph"
    if lacking is not None:
        return Row(name, "", "not run", lacking)
    eager = model(text).logits.float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    try:
        logits = step("patched: compiling", lambda: compiled(text).logits.float())
    except torch._dynamo.exc.TorchDynamoException as error:
        console.print(f"[red]{error}", markup=False)
        return Row(name, "", f"failed: {type(error).__name__}", "one graph", False)
    graphs, breaks = compile_counts()
    error = (logits - eager).abs().max().item()
    shown = f"{graphs} graph, {breaks} breaks, {error:.1e} from eager"
    return Row(name, "", shown, f"1 graph, within {bound:.1e}", graphs == 1 and breaks == 0 and error <= bound)


def cost_rows(costs: dict[str, tuple[float, float | None]], length: int) -> list[Row]:
    """Time and peak memory: nothing is required of them here."""
    seconds = {way: f"{s * 1e3:.0f} ms" for way, (s, _) in costs.items()}
    memory = {way: "not measured" if m is None else f"{m:.0f} MiB" for way, (_, m) in costs.items()}
    rows = []
    for name, shown in ((f"forward of {length} tokens", seconds), ("peak memory it adds", memory)):
        rows.append(Row(name, f"{shown['eager']}; sdpa: {shown['sdpa']}", shown["patched"]))
    return rows


def table_of(rows: list[Row]) -> Table:
    table = Table(title="stock transformers and hf-flash-mc")
    for heading in ("", "stock (eager)", "patched", "required", ""):
        table.add_column(heading, overflow="fold")
    verdict = {True: "[green]pass", False: "[bold red]FAIL", None: ""}
    for row in rows:
        table.add_row(row.name, row.stock, row.patched, row.required, verdict[row.passed])
    return table


def explain(model: Any, length: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which back end a causal call of this model's shape gets, and why."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)
    k = torch.empty(1, key_heads, length, head_dim, dtype=dtype, device=device)
    return str(explain_attention(q, k, k, causal=True))


if __name__ == "__main__":
    raise SystemExit(main())
