"""halflap as a model of lm-evaluation-harness, and tasks run on it: ours over local files, or the harness's own.

Requests are batched by length and right-padded, which causality makes exact. Prompts longer than the window lose
their beginning, as in the harness's own models, and are counted. To use the harness's own command line, import this
module first; the model is then called "halflap": `--model_args pretrained=DIR,dtype=float32`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from halflap.checkpoints.config import end_ids
from halflap.checkpoints.streamed import AnyModel, StreamedModel
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError
from halflap.evaluate.held_out import default_context
from halflap.evaluate.local_tasks import local_tasks, resolve_task, unknown_task
from halflap.inference.answers import score_answers
from halflap.inference.generate import generate, require_positions, with_prefix
from halflap.inference.log_probs import length_batches
from halflap.models.model import HybridModel
from halflap.progress import Progress

# read by the libraries when they are imported: nothing is looked up on the network, no bars, no processes
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DISABLE_MULTIPROC": "1",
}.items():
    os.environ.setdefault(_name, _value)

try:
    import lm_eval.models  # noqa: F401  the harness looks for its own models only while it knows none at all
    from lm_eval.api import task as harness_tasks
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as harness_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HalflapError(f"tasks need lm-evaluation-harness ({error}): pip install 'halflap[eval]'") from error

NEW_TOKENS = 256  # of an open answer when a task names no limit, as in the harness's own models
BOOTSTRAP = 1000  # resamples for standard errors that have no closed form
FULL_WINDOWS = 4  # tokens of a batch, in windows


class HalflapLM(TemplateLM):
    """A HybridModel and its tokenizer behind the harness's interface; `truncated` counts prompts that lost tokens."""

    def __init__(
        self,
        model: AnyModel | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        pretrained: str | None = None,
        context: int | None = None,
        batch_size: int | str = FULL_WINDOWS,
        dtype: str = "auto",
        device: str | None = None,
        **_: object,
    ) -> None:
        """A loaded model with its tokenizer, or `pretrained`, a directory; `batch_size` counts full windows."""
        super().__init__()
        if model is None:
            model, tokenizer = _load(pretrained, dtype, device)
        if tokenizer is None:
            raise HalflapError(
                "tasks are text and the model has no tokenizer; put its tokenizer.json beside the weights"
            )
        tokenizer.check_matches(model.config.vocab_size)
        self.model, self.tokenizer = model, tokenizer  # type: ignore[assignment]
        self.max_length = int(context or default_context(model.config))
        require_positions(model.config, self.max_length, "a window takes")
        self.batch_tokens = self.max_length * (batch_size if isinstance(batch_size, int) else FULL_WINDOWS)
        self.truncated = 0
        self._device = model.device

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        ends = end_ids(self.model.config)
        if self.tokenizer.eos_id is None and not ends:
            raise HalflapError("the tokenizer names no end token; set eos_token in its tokenizer_config.json")
        return ends[0] if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the beginning token, else the end token, as in the harness's own models."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else with_prefix(self.tokenizer, ids)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.digest

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    # ---- requests

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # progress is ours

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], what: str = "score answers", **_: object
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would write it) of each request."""
        pairs = [self._window(context, continuation) for _, context, continuation in requests]
        with Progress(what, len(requests), unit="requests") as progress:
            answers = score_answers(self.model, pairs, batch_tokens=self.batch_tokens, advance=progress.advance)
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], tuple(answer))
        return [(answer.log_prob, answer.greedy) for answer in answers]

    def _window(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What fits of both: the context loses its beginning first, then the continuation its own."""
        self.truncated += len(context) + len(continuation) > self.max_length + 1
        continuation = continuation[-self.max_length :]
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in windows, each token predicted once (the harness's own windows)."""
        parts: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                parts.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(parts, "score text"), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text of each (context, settings), until one of its stop strings."""
        if isinstance(self.model, StreamedModel):
            raise HalflapError(
                "a task has the model write its answers, which takes all of it in memory, and it is read a block at a "
                "time; choose tasks with given answers, or a machine with more memory"
            )
        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with Progress("write answers", len(requests), unit="requests") as progress:
            for same in kinds.values():
                settings, limit = _generation_settings(requests[same[0]].args[1])
                prompts = [self._prompt(requests[i].args[0], limit) for i in same]
                for rows in length_batches([len(prompt) + limit for prompt in prompts], self.batch_tokens):
                    chosen = [prompts[row] for row in rows]
                    written = generate(self.model, chosen, limit, tokenizer=self.tokenizer, **settings)
                    for row, completion in zip(rows, written, strict=True):
                        answers[same[row]] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[same[row]].args, completion.text)
                    progress.advance(len(rows))
        return answers

    def _prompt(self, text: str, limit: int) -> list[int]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        room = max(1, self.max_length - limit)
        self.truncated += len(ids) > room
        return ids[-room:]


register_model("halflap")(HalflapLM)


def _load(pretrained: str | None, dtype: str, device: str | None) -> tuple[HybridModel, Tokenizer]:
    from halflap.checkpoints.checkpoint import load_model

    if pretrained is None:
        raise HalflapError("no model was given; write --model_args pretrained=DIR")
    return load_model(pretrained, dtype=dtype, device=device or "cpu"), Tokenizer.load(pretrained)  # type: ignore[arg-type]


def _generation_settings(given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The harness's generation settings as `generate` takes them, and how many new tokens."""
    given = dict(given)
    stop = given.pop("until", None) or []
    limit = next((given.pop(n) for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in given), NEW_TOKENS)
    sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
    known = {n: given[n] for n in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if n in given}
    if not sampled:
        known["temperature"] = 0.0
    return {"stop": [stop] if isinstance(stop, str) else [s for s in stop if s], **known}, int(limit)


# ---- tasks


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks and groups of tasks by name, as the harness's own loader gives them."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


def load_tasks(names: Sequence[str]) -> Tasks:
    """Tasks and groups by name, our own first. Raises HalflapError for unknown names and data that is not there."""
    ours = local_tasks()
    if wrong := [name for name in names if name not in ours and name.endswith("_local")]:
        raise unknown_task(wrong[0], list(ours))
    with _quiet_harness():
        manager = TaskManager(include_defaults=any(name not in ours for name in names))  # its index takes seconds
        found = Tasks()
        for name in dict.fromkeys(names):
            if name in ours:
                found.tasks[name] = ConfigurableTask(config=resolve_task(ours[name]))
            elif name in manager.all_tasks:
                loaded = _load_stock(manager, name, f"{name}_local" if f"{name}_local" in ours else None)
                found.tasks.update(loaded["tasks"])
                found.groups.update(loaded.get("groups", {}))
            else:
                raise unknown_task(name, [*ours, *manager.all_tasks])
    return found


def _load_stock(manager: TaskManager, name: str, local: str | None) -> Any:
    try:
        return manager.load(name)
    except Exception as error:  # each task's data loader raises what it likes
        instead = f"take {local}, which reads local files" if local else "take one of the local tasks"
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.100}"
        raise HalflapError(
            f"task {name!r} cannot load its data ({reason}); {instead}, or allow downloads with HF_HUB_OFFLINE=0 and "
            "HF_DATASETS_OFFLINE=0"
        ) from error


def run_tasks(
    model: AnyModel,
    tokenizer: Tokenizer,
    tasks: Tasks,
    *,
    limit: int | None = None,
    context: int | None = None,
    batch_size: int = FULL_WINDOWS,
    seed: int = 0,
) -> dict[str, Any]:
    """{"tasks": {name: {metric: value, metric_stderr: value, "items": n}}, "truncated": prompts that lost tokens}.

    `limit` takes the first items of a task, or items spread over the file where the task file says so.
    """
    if limit is not None and limit < 1:
        raise HalflapError(f"limit is {limit}; it must be at least 1: give the number of items of each task")
    harness = HalflapLM(model, tokenizer, context=context, batch_size=batch_size)
    for task in tasks.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    loaded: Any = {"tasks": tasks.tasks, "groups": tasks.groups}
    loaded["group_map"] = {name: group.child_names for name, group in tasks.groups.items()}
    samples = None if limit is None else {name: _indices(task, limit) for name, task in tasks.tasks.items()}
    with _quiet_harness():
        results: Any = harness_evaluate(harness, loaded, samples=samples, bootstrap_iters=BOOTSTRAP, log_samples=False)
    items = results.get("n-samples", {})
    found = {name: _plain_metrics(numbers, items.get(name)) for name, numbers in results["results"].items()}
    return {"tasks": found, "truncated": harness.truncated}


def _indices(task: Any, limit: int) -> list[int]:
    count = len(task.eval_docs)
    limit = min(limit, count)
    spread = (task.config.metadata or {}).get("spread", False)
    return [i * count // limit for i in range(limit)] if spread else list(range(limit))


def _plain_metrics(numbers: dict[str, Any], samples: dict[str, int] | None) -> dict[str, Any]:
    """{"acc,none": 0.3, "acc_stderr,none": 0.1} to {"acc": 0.3, "acc_stderr": 0.1, "items": n}."""
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        metric, _, kind = name.partition(",")
        if kind and not isinstance(value, str):
            found[metric if kind == "none" else f"{metric}_{kind}"] = float(value)
    return found | ({"items": samples["effective"]} if samples else {})


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness's prints, its bars and its chatter below errors away."""
    bars = harness_tasks.tqdm  # tqdm's own class: whoever in the harness shows a bar shows one of these
    start = bars.__init__
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars.__init__ = functools.partialmethod(start, disable=True)  # type: ignore[method-assign,assignment]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        bars.__init__ = start  # type: ignore[method-assign]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
