"""generate: transformers' sampling over a session, with a refocus every few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

if TYPE_CHECKING:
    from .session import MegaContextSession

DEFAULT_NEW_TOKENS = 20  # as in transformers
# settings that ask for more than one sequence, a second model or another method, and what else leaves them off
_OFF = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "guidance_scale": 1} | dict.fromkeys(
    (
        "penalty_alpha",
        "dola_layers",
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
        "use_mtp",
        "constraints",
        "force_words_ids",
        "token_healing",
        "watermarking_config",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
    )
)


@torch.no_grad()
def generate(
    session: MegaContextSession,
    input_ids: Any = None,
    *,
    generation_config: Any = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    tokenizer: Any = None,
    refocus: bool = True,
    **options: Any,
) -> Tensor:
    """Read ``input_ids`` (if any) and continue the history, greedily or by sampling.

    Settings mean what they mean in transformers' ``model.generate``: they are a GenerationConfig's, over the model's
    own one (but for its ``max_length``, as a history may be longer than the model's range, and its cache's settings:
    a session has a cache of its own). Lengths count all of the history; logits processors see its last ``w_max``
    tokens. The history then holds the new tokens too.

    Args:
        input_ids: token ids ``[n]`` or ``[1, n]``, or None to go on.
        generation_config, logits_processor, stopping_criteria, streamer, tokenizer: as in transformers.
        refocus: refocus before the first new token, and then every ``refocus_interval`` tokens. While all history
            is in the window as tokens there is nothing to refocus, and this is the base model's own generation.
        options: fields of a GenerationConfig: max_new_tokens, do_sample, temperature, top_p, ...

    Returns:
        The new token ids, ``[1, n]`` on the model's device.

    Raises:
        NotImplementedError: beams, several sequences, assistants. ValueError: unknown settings, ids outside the
            vocabulary, an empty history.
    """
    run = Continuation(
        session,
        input_ids,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        streamer=streamer,
        tokenizer=tokenizer,
        refocus=refocus,
        **options,
    )
    session.ingest(run.prompt)
    run.begin()
    while not run.done:
        session.step(run.choose().cpu(), refocus)
        run.check()
    return run.end()


class Continuation:
    """One history being continued: what transformers' ``generate`` keeps of a sequence. Arguments as `generate`'s.

    Attributes:
        prompt: token ids [n] to be read before `begin`. done: nothing more is to come.
    """

    def __init__(
        self,
        session: MegaContextSession,
        input_ids: Any,
        *,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        streamer: Any = None,
        tokenizer: Any = None,
        refocus: bool = True,
        **options: Any,
    ) -> None:
        session.check_open()
        self.session, self.streamer, self.tokenizer, self.refocus = session, streamer, tokenizer, refocus
        nothing = torch.empty(0, dtype=torch.int64)
        self.prompt = nothing if input_ids is None else session._checked_ids(input_ids)
        self.config, self.limit = _settings(session, generation_config, options, len(session) + len(self.prompt))
        session._check_range(len(self.prompt) + self.limit)
        if not len(self.prompt) and not len(session):
            raise ValueError("input_ids: the history is empty, so there is nothing to continue; expected some ids")
        most, device = session.config.w_max, session.device
        self.seen = torch.cat((session.tokens(-most), self.prompt))[None, -most:].to(device)
        self.start = self.seen.shape[1]
        # all that can be wrong with settings comes up here, before the prompt is read
        self._make_rules(len(session) + len(self.prompt), logits_processor, stopping_criteria)

    def _make_rules(self, read: int, logits_processor: Any, stopping_criteria: Any) -> None:
        """Logits processors and stopping criteria of transformers, after a history of ``read`` tokens."""
        config, model, device = self.config, self.session.model, self.seen.device
        config.max_length = self.start + self.limit
        if config.min_new_tokens is not None:
            config.min_length = None  # as in transformers
        elif config.min_length:
            config.min_length = max(0, config.min_length - read + self.start)
        model._prepare_special_tokens(config, True, device=device)
        self._processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=self.start,
            encoder_input_ids=self.seen,
            logits_processor=logits_processor,
            device=device,
        )
        config.max_length = None  # counted here; transformers' criterion would warn of the model's range
        criteria = stopping_criteria or StoppingCriteriaList()
        self._criteria = model._get_stopping_criteria(config, criteria, tokenizer=self.tokenizer)

    def begin(self) -> None:
        """The prompt has been read: refocus, and make ready to choose."""
        session = self.session
        if self.refocus and (session.working_context.lod > 0).any():
            session.refocus()
        if self.streamer is not None:
            self.streamer.put(self.prompt[None])  # [1, n], as transformers does
        self.done = self.limit == 0

    def choose(self) -> Tensor:
        """The next token, [1]."""
        scores = self._processors(self.seen, self.session.next_logits()[None].float())
        drawn = self.config.do_sample
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if drawn else scores.argmax(-1)  # [1]
        self.seen = torch.cat((self.seen, token[:, None]), 1)
        if self.streamer is not None:
            self.streamer.put(token.cpu())
        return token

    def check(self) -> None:
        """After the token was read: see whether it was the last."""
        full = self.seen.shape[1] - self.start >= self.limit
        self.done = full or bool(self._criteria(self.seen, None).all())

    def end(self) -> Tensor:
        """The new token ids, [1, n]."""
        if self.streamer is not None:
            self.streamer.end()
        return self.seen[:, self.start :]


def _settings(session: MegaContextSession, given: Any, options: dict[str, Any], read: int) -> tuple[Any, int]:
    """The GenerationConfig in force, and how many tokens may come after a history of ``read``."""
    if options.pop("attention_mask", None) is not None:
        raise ValueError("attention_mask: a session is one history without padding; leave it out")
    config, unknown = session.model._prepare_generation_config(given, **options)
    if unknown := unknown.keys() - _OFF.keys():  # transformers hands some fields back as well, for the model
        raise ValueError(f"generate: expected fields of a GenerationConfig, got {sorted(unknown)}")
    asked = {name: getattr(config, name, None) for name in _OFF}
    wrong = [f"{name}={value}" for name, value in asked.items() if value not in (None, False, _OFF[name])]
    if wrong:
        raise NotImplementedError(
            f"generate: {', '.join(wrong)}: a session continues one history by greedy search or sampling; its way out "
            "is several sessions, or model.generate on the base model"
        )
    limit = config.max_new_tokens
    if limit is None and (longest := options.get("max_length", getattr(given, "max_length", None))) is not None:
        limit = longest - read
        if limit < 1:
            raise ValueError(f"max_length: expected more than the {read} tokens of the history, got {longest}")
    limit = DEFAULT_NEW_TOKENS if limit is None else int(limit)
    return config, limit
