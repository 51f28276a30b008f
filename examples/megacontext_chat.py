"""A long document in, questions answered: a small model with a window of its choice, and a history of any length.

    python examples/megacontext_chat.py                                    # Python's language reference, one question
    python examples/megacontext_chat.py --text book.txt                    # then type questions
    python examples/megacontext_chat.py --text book.txt --folder history   # on disk; the next start goes on from there

The document is read into a history; what the window cannot hold is kept as gists. Each question is read, the working
context is refocused on what the question attends to, and the answer is streamed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure.run import check_device

QUESTION = "What does the with statement do?"


def main() -> None:
    options = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokenizer, model = load(options)
    attach_megacontext(model, MegaContextConfig(w_max=options.window, lens={"kind": options.lens}))
    session = open_session(model, tokenizer, options)
    print(f"{len(session)} tokens of history in {session.working_context}")
    if options.text is None and not options.ask:
        options.ask = [QUESTION]
    for question in options.ask or iter(lambda: input("\n> ").strip(), ""):
        answer(session, tokenizer, question, options)
    if options.plot:
        session.plot(options.plot)
    if options.folder:
        session.save(options.folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--text", help="a text file (default: Python's language reference)")
    parser.add_argument("--tokens", type=int, help="read at most so many tokens (default: all; 4096 without --text)")
    parser.add_argument("--ask", action="append", help="a question; may be given more than once (default: type them)")
    parser.add_argument("--window", type=int, default=1024, help="slots of the working context (default 1024)")
    parser.add_argument("--lens", default="recall", choices=["recall", "gist_mass", "recency", "random"])
    parser.add_argument("--rounds", type=int, default=3, help="refocuses before an answer (default 3)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--folder", help="keep the history there; if it is there already, go on from it")
    parser.add_argument("--plot", help="write a picture of the working context there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Tokenizer and model."""
    check_device(options.device)
    folder = options.model
    if folder is None:
        from smollm2 import smollm2_folder

        folder = str(smollm2_folder())
    dtype = getattr(torch, dtype_on(torch.device(options.device)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    return AutoTokenizer.from_pretrained(folder), model


def dtype_on(device: torch.device) -> str:
    """Of the model."""
    return "float32" if device.type == "cpu" else "bfloat16"


def open_session(model: Any, tokenizer: Any, options: argparse.Namespace) -> Any:
    """A saved session, or a new one that has read the document."""
    if options.folder and Path(options.folder, "session.safetensors").exists():
        return model.megacontext.load_session(options.folder)
    session = model.megacontext.session(options.folder)
    text = Path(options.text).read_text() if options.text else "\n\n".join(topics[name] for name in sorted(topics))
    limit = options.tokens or (None if options.text else 4096)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :limit]
    session.ingest(ids, progress=True)
    return session


def answer(session: Any, tokenizer: Any, question: str, options: argparse.Namespace) -> None:
    """Read a question, look where it points, and stream the answer; both stay in the history."""
    prompt = f"\n\nQuestion: {question}\nAnswer:"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[0]
    print(prompt.strip(), end=" ", flush=True)
    start = time.perf_counter()
    session.ingest(ids)
    session.refocus(rounds=options.rounds, reread=len(ids))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"max_new_tokens": options.new_tokens, "do_sample": False, "repetition_penalty": 1.2}
    tokens = session.generate(streamer=streamer, tokenizer=tokenizer, **sampling)
    report = session.telemetry()
    print(
        f"[{tokens.shape[1]} tokens in {time.perf_counter() - start:.1f} s; {report['expansions']} expansions so far, "
        f"{report['working_context_slots']} slots for {report['history_tokens']} tokens]"
    )


if __name__ == "__main__":
    main()
