"""A fabricated demo: every artifact that a report reads, with invented numbers. Nothing here was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from halflap.compress.plan import PruningPlan
from halflap.models.config import AttentionConfig, Mamba2Config, MLPConfig, ModelConfig
from halflap.models.count import count_parameters
from halflap.models.patterns import parse_pattern
from halflap.report.arms import Arm, Arms

PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M-"
NOTE = "fabricated for tests"
HIDDEN, HEADS, GROUPS, CHANNELS, STATE, NEURONS = 384, 24, 4, 32, 64, 1536


def teacher_config() -> ModelConfig:
    blocks = {
        "M": Mamba2Config(HEADS, CHANNELS, GROUPS, STATE),
        "*": AttentionConfig(12, 4, 32),
        "-": MLPConfig(NEURONS),
    }
    return ModelConfig("nemotron_h", 8192, HIDDEN, parse_pattern(PATTERN, blocks))


def widths(config: ModelConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    depth = len(config.blocks)
    found = {"hidden": random.lognormal(0, 0.5, (1, HIDDEN)) * np.linspace(1, 3, depth)[:, None]}
    for index, block in enumerate(config.blocks):
        name = f"blocks.{index}"
        if isinstance(block, Mamba2Config):
            heads = random.lognormal(0, 0.7, (GROUPS, HEADS // GROUPS, 1))
            found[f"{name}.inner"] = heads * random.lognormal(0, 0.4, (1, 1, CHANNELS))
            found[f"{name}.state"] = random.lognormal(0, 0.4, (GROUPS, STATE))
        elif isinstance(block, AttentionConfig):
            found[f"{name}.query"] = random.lognormal(0, 0.4, (4, 3))
        else:
            found[f"{name}.neuron"] = random.lognormal(0, 1.0, (NEURONS,))
    return found


def plan_of(config: ModelConfig, scores: dict[str, np.ndarray]) -> PruningPlan:
    """Drop blocks 13 and 21; keep 288 hidden channels, 16 heads, 28 channels, 1024 neurons."""

    def best(values: np.ndarray, count: int) -> tuple[int, ...]:
        return tuple(sorted(np.argsort(-values)[:count].tolist()))

    stay = tuple(i for i in range(len(config.blocks)) if i not in (13, 21))
    keep: dict[str, Any] = {"hidden": best(scores["hidden"].sum(0), 288)}
    for i in stay:
        if isinstance(config.blocks[i], Mamba2Config):
            inner = scores[f"blocks.{i}.inner"]
            keep[f"blocks.{i}.head"] = tuple(best(row, 4) for row in np.sqrt((inner**2).sum(-1)))
            keep[f"blocks.{i}.channel"] = best(np.sqrt((inner**2).sum((0, 1))), 28)
        elif isinstance(config.blocks[i], MLPConfig):
            keep[f"blocks.{i}.neuron"] = best(scores[f"blocks.{i}.neuron"], 1024)
    return PruningPlan("t" * 64, config, stay, keep, importance="i" * 64)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def curve(
    start: float,
    end: float,
    tokens: int,
    *,
    teacher: float | None = None,
    steps: int = 240,
    every: int = 20,
    **words: str,
) -> list[dict[str, Any]]:
    random = np.random.default_rng(steps)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        share = step / steps
        loss = end + (start - end) * math.exp(-7 * share) * (1 - share)
        at = {"step": step, "tokens": round(tokens * share), **words}
        train = loss + 0.06 * random.standard_normal() + 0.04
        if teacher is not None:
            train -= teacher
        measured = {"loss": train} if teacher is None else {"loss": train, "forward_kl": train}
        rows.append(at | measured | {"tokens_per_second": 2100.0})
        if step % every == 0:
            rows.append(at | {"held_out_loss": loss})
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def judged(loss: float, tokens: int = 131_072) -> dict[str, Any]:
    spread = [loss - 0.021, loss + 0.021]
    bits = loss / math.log(2) / 3.9
    return {
        "loss": loss,
        "loss_interval": spread,
        "perplexity": math.exp(loss),
        "perplexity_interval": [math.exp(x) for x in spread],
        "bits_per_byte": bits,
        "bits_per_byte_interval": [bits - 0.01, bits + 0.01],
        "tokens": tokens,
        "bytes": round(tokens * 3.9),
        "documents": 61,
        "context": 512,
        "stride": 512,
        "resampled": "documents",
    }


def bench(decode: float, prefill: float) -> dict[str, Any]:
    def row(prompt: int, batch: int) -> dict[str, Any]:
        speed = decode * batch**0.8
        return {
            "prompt": prompt,
            "output": 32,
            "batch": batch,
            "dtype": "float32",
            "prefill_tokens_per_second": prefill * batch**0.1,
            "prefill_tokens_per_second_spread": 30.0,
            "decode_tokens_per_second": speed,
            "decode_tokens_per_second_spread": 1.5,
            "time_to_first_token_ms": 1000 * prompt / prefill,
            "decode_step_ms": 1000 * batch / speed,
            "peak_memory_bytes": round(4.1e8 * (150 / decode)),
            "cache_bytes": 1_900_000 * batch,
        }

    hardware = {"processor": "an invented processor", "cores": 2, "threads": 2, "memory_bytes": 8_000_000_000}
    return {
        "hardware": hardware,
        "kernels": {"setting": "auto", "ops": {"scan": "native", "norm": "native"}},
        "rows": [row(512, 1), row(512, 8)],
    }


def candidates(total: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    rows = []
    for index in range(11):
        params = round(total * (0.479 + 0.0021 * index - 0.001 * (index % 3)))
        scored, refined = index < 8, index < 4
        sizes = {
            "hidden_size": 320 - 16 * (index % 5),
            "intermediate_size": 768 + 128 * index,
            "mamba_num_heads": 16 + 4 * (index % 3),
        }
        if index % 2 == 0:
            sizes["num_blocks"] = 24
        rows.append(
            {
                "sizes": sizes,
                "costs": {
                    "params": params,
                    "non_embedding_params": params - 6_000_000,
                    "memory": 2 * params,
                    "flops": 2 * params,
                },
                "hurt": 0.3 + 0.05 * index,
                "loss": float(5.1 + 0.09 * index + 0.2 * random.random()) if scored else None,
                "refined_loss": 4.02 + 0.05 * index if refined else None,
                "chosen": index == 0,
            }
        )
    return rows


def write_compress(run: Path) -> Path:
    """A finished run of `compress`, beside which nothing else is needed."""
    config = teacher_config()
    scores = widths(config)
    plan = plan_of(config, scores)
    depth = np.random.default_rng(5).lognormal(-2.5, 1.1, len(config.blocks))
    depth[0], depth[[13, 21]] = 2.1, (0.006, 0.008)
    tensors = {f"width/{name}": value.astype(np.float32) for name, value in scores.items()} | {
        "depth/kl": depth.astype(np.float32)
    }
    header = {
        "format": "halflap-importance-1",
        "metric": "activation",
        "teacher": "t" * 64,
        "calibration": "c" * 64,
        "tokens": 262_144,
    }
    run.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, run / "importance.safetensors", {"halflap": json.dumps(header)})
    plan.save(run / "pruned" / "pruning_plan.json")
    axes = [
        ("hidden_size", 288, 384, 2e-13),
        ("intermediate_size", 11264, 18432, 0.0),
        ("mamba_num_heads", 176, 264, 4e-14),
        ("num_blocks", 24, 26, 0.0),
    ]
    write(
        run / "pruned" / "certificate.json",
        {
            "passed": True,
            "max_abs_error": 3.1e-6,
            "tolerance": 1.2e-3,
            "logit_scale": 12.4,
            "exact_max_abs_error": 3.4e-13,
            "exact_tolerance": 1.2e-8,
            "arithmetic": "float64",
            "stored": "float32",
            "norm_correction": "masked",
            "reference": "the teacher with the cut indices set to zero; norms divide by all channels",
            "axes": [
                {
                    "axis": a,
                    "kept": k,
                    "total": t,
                    "blocks": 11,
                    "max_abs_error": e,
                    "logit_scale": 12.4,
                    "passed": True,
                }
                for a, k, t, e in axes
            ],
        },
    )
    steps = [
        {"verb": "pretrain", "inputs": {"corpus": "9d" * 32}, "tokens": 31_457_280, "loss": 3.243},
        {
            "verb": "prune",
            "inputs": {"teacher": "t" * 64, "importance": "1e" * 32},
            "plan": "ab" * 32,
            "parameters": count_parameters(plan.student),
        },
        {
            "verb": "distill",
            "inputs": {"teacher": "t" * 64, "student": "5c" * 32, "corpus": "77" * 32},
            "tokens": 4_194_304,
            "loss": 0.212,
        },
    ]
    for folder, count in (("checkpoint", 3), ("pruned", 2)):
        write(run / folder / "lineage.json", {"steps": steps[:count]})
        write(run / folder / "halflap.json", {"format": 1, "halflap": "0", "config": plan.student.to_json()})
    made_from = {"teacher": "t" * 64, "importance": "1e" * 32, "budget": {"params": "50%"}}
    total = count_parameters(config)
    write(
        run / "search.json",
        {
            "format": "halflap-search-1",
            "made_from": made_from,
            "tried": 810,
            "remark": None,
            "candidates": candidates(total),
        },
    )
    write_lines(run / "metrics.jsonl", curve(5.3, 3.46, 4_194_304, teacher=3.243, phase="distill"))
    write(run / "scores.json", {"teacher": judged(3.243), "pruned": judged(5.318), "student": judged(3.462)})
    write(run / "bench.json", {"teacher": bench(150.0, 2600.0), "student": bench(262.0, 4700.0)})
    write(
        run / "status.json",
        {
            "state": "finished",
            "verb": "compress",
            "finished": "2026-08-30T12:00:00+00:00",
            "seconds": 540.0,
            "result": {},
        },
    )
    write(
        run / "environment.json",
        {
            "versions": {"halflap": "0", "torch": "2.13", "note": NOTE},
            "machine": {"cores": 2, "memory_bytes": 8_000_000_000},
            "command": ["halflap", "compress", "teacher", "--params", "50%"],
        },
    )
    write(
        run / "inputs.json",
        {
            "model": [{"path": "runs/teacher/checkpoint", "files": 9, "bytes": 23_000_000, "sha256": "5e" * 32}],
            "data": [
                {
                    "path": "../shared/data/a-rather-long-folder-name/books.jsonl.xz",
                    "files": 1,
                    "bytes": 9_000_000,
                    "sha256": "d1" * 32,
                }
            ],
        },
    )
    (run / "recipe.yaml").write_text(
        "# fabricated for tests\nverb: compress\nmodel: runs/teacher\nparams: 50%\nfit:\n  learning_rate: 0.001\n",
        encoding="utf-8",
    )
    return run


def write_demo(root: Path) -> Path:
    """A folder with arms.json and the runs that it names."""
    write_compress(root / "compress")
    for name, start, end, teacher in (
        ("scratch", 9.01, 4.027, None),
        ("group-blind", 5.9, 3.571, 3.243),
        ("random", 6.6, 3.694, 3.243),
    ):
        write_lines(root / name / "metrics.jsonl", curve(start, end, 4_194_304, teacher=teacher))
        write(root / name / "status.json", {"state": "finished", "verb": "distill", "result": {"loss": end}})
    before = count_parameters(teacher_config())
    after = count_parameters(plan_of(teacher_config(), widths(teacher_config())).student)

    def arm(name: str, loss: float, **more: Any) -> Arm:
        values = {"parameters": after, "tokens_trained": 4_194_304, "seconds": 402.0} | more
        return Arm(
            name,
            loss=loss,
            loss_ci=(loss - 0.021, loss + 0.021),
            bits_per_byte=loss / 2.7,
            perplexity=math.exp(loss),
            **values,
        )

    arms = (
        arm(
            "teacher",
            3.243,
            parameters=before,
            tokens_trained=31_457_280,
            seconds=21_000.0,
            role="teacher",
            description="as trained",
        ),
        arm("pruned only", 5.318, tokens_trained=0, seconds=None, role="pruned", description="cut, no training after"),
        arm(
            "pruned + distilled",
            3.462,
            role="student",
            run="compress",
            description="cut, then trained on its teacher’s outputs",
        ),
        arm("from scratch", 4.027, run="scratch", description="the same shape, random weights, the same tokens"),
        arm("group-blind", 3.571, run="group-blind", description="Mamba heads ranked without regard to their groups"),
        arm("random ranking", 3.694, run="random", description="what is cut is drawn by lot"),
    )
    Arms(
        arms, (1,), "131,072 tokens of 61 documents kept back (fabricated for tests)", "95 % bootstrap over documents"
    ).save(root / "arms.json")
    return root


@pytest.fixture
def compress_run(tmp_path: Path) -> Path:
    return write_compress(tmp_path / "half")


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return write_demo(tmp_path / "demo")
