"""A long stream of text through a bounded window: memory stays where it was, and every rule holds to the end.

    python examples/soak.py                                                     # 6000 tokens, on a CPU in minutes
    python examples/soak.py --tokens 1000000 --window 2048 --chunk 512 --out soak.json  # in full, for a GPU

Reads ``--tokens`` tokens into one history on disk and measures, every ``--every`` tokens: device memory, the process's
own memory on the host, speed, swap rate. Ends with exit code 1 if a rule of the working context breaks, the budget is
exceeded, the history is not what was read, or the device's memory at the end is 2 % above that at 10000 tokens. The
file is written anew after each measurement, so that a run that is stopped leaves what it found.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from megacontext_chat import dtype_on, load
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure.record import describe_command, without_folders, write_json

SETTLED = 10_000  # tokens after which memory should not grow
ALLOWED = 1.02


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for path in (options.out, options.plot):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load(options)
    attach_megacontext(model, MegaContextConfig(w_max=options.window, lens={"kind": options.lens}))
    text = tokenizer("\n\n".join(topics[n] for n in sorted(topics)), return_tensors="pt", verbose=False).input_ids[0]
    device, given = torch.device(options.device), sys.argv[1:] if arguments is None else arguments
    run = describe_command(device, ["python", "examples/soak.py"], given, "one stream", dtype_on(device))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or Path(scratch) / "history")
        session = model.megacontext.session(folder, chunk_size=options.chunk)

        def keep(rows: list[dict[str, float]], problems: list[str]) -> None:
            if options.out:
                size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
                found = {"run": run, "options": without_folders(vars(options)), "rows": rows}
                found |= {"telemetry": session.telemetry(), "history_mib": size, "problems": problems}
                write_json(found, Path(options.out))

        rows = stream(session, text, options, keep)
        problems = check(session, text, rows)
        keep(rows, problems)
        session.close()
    print(", ".join(f"{name} {value:.4g}" for name, value in session.telemetry().items()))
    if options.plot:
        from hf_flash_mc.megacontext.plots import plot_soak

        plot_soak(rows, options.plot)
    print("\n".join(problems) or "every check passed")
    return 1 if problems else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--every", type=int, help="tokens between two measurements (default: a twentieth)")
    parser.add_argument("--window", type=int, default=512, help="slots of the working context (default 512)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of one forward (default 256)")
    parser.add_argument("--lens", default="recall", choices=["recall", "gist_mass", "recency", "random"])
    parser.add_argument("--refocus", action="store_true", help="refocus after every chunk, too")
    parser.add_argument("--folder", help="where the history is written, 23 KB a token (default: a temporary folder)")
    parser.add_argument("--out", help="JSON file for the measurements")
    parser.add_argument("--plot", help="picture of the measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    for name in ("tokens", "every", "window", "chunk"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name}: expected at least 1, got {given}")
    return options


def stream(session: Any, text: torch.Tensor, options: argparse.Namespace, keep: Any) -> list[dict[str, float]]:
    """Read the text over and over, up to so many tokens; the measurements, each of which is kept at once."""
    every = options.every or max(options.chunk, options.tokens // 20)
    rows: list[dict[str, float]] = []
    while len(session) < options.tokens:
        start, before = time.perf_counter(), len(session)
        count = min(every, options.tokens - before)
        ids = text.roll(-before).repeat(count // len(text) + 1)[:count]
        if session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        session.ingest(ids, refocus=options.refocus)
        session.check_invariants()
        report = session.telemetry()
        rows.append(
            {
                "tokens": len(session),
                "device_mib": torch.cuda.max_memory_allocated() / 2**20 if session.device.type == "cuda" else 0.0,
                "host_mib": own_memory(),
                "tokens_per_second": count / (time.perf_counter() - start),
                "slots": report["working_context_slots"],
                "swap_rate": report["swap_rate"],
            }
        )
        print(describe(rows[-1]), flush=True)
        if len(session) < options.tokens:
            keep(rows, [f"stopped at {len(session):,} of {options.tokens:,} tokens"])
    return rows


def describe(row: dict[str, float]) -> str:
    """A measurement as a line."""
    device = f"{row['device_mib']:.0f} MiB on the GPU, " if row["device_mib"] else ""
    return (
        f"{row['tokens']:,} tokens in {row['slots']} slots: {device}{row['host_mib']:.0f} MiB on the host, "
        f"{row['tokens_per_second']:.0f} tokens/s, swap rate {row['swap_rate']:.2f}"
    )


def own_memory() -> float:
    """MiB of the process that are not pages of files (Linux), else its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
    except (OSError, StopIteration):
        scale = 2**20 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def check(session: Any, text: torch.Tensor, rows: list[dict[str, float]]) -> list[str]:
    """What went wrong, if anything."""
    problems = []
    if any(row["slots"] > session.config.w_max for row in rows):
        problems.append("the budget was exceeded")
    settled = next((row for row in rows if row["tokens"] >= SETTLED), rows[-1])
    if rows[-1]["device_mib"] > ALLOWED * settled["device_mib"]:
        problems.append(f"device memory grew from {settled['device_mib']:.0f} to {rows[-1]['device_mib']:.0f} MiB")
    for start in range(0, len(session), max(1, len(session) // 7)):
        got = session.tokens(start, start + 50)
        expected = text[(torch.arange(start, start + len(got))) % len(text)]
        if len(text) >= 50 and not torch.equal(got, expected):
            problems.append(f"tokens from {start} on are not what was read")
    return problems


if __name__ == "__main__":
    raise SystemExit(main())
