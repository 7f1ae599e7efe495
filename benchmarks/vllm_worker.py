"""vLLM's engine for vllm_cpu.py, run by vLLM's Python: a JSON line of prompts in, a JSON line of seconds out.

    PYTHON benchmarks/vllm_worker.py '{"model": DIR, ...}'     the object is what `vllm.LLM` is made with

In: {"prompts": [[ids]], "tokens": new ones of each}; out: {"seconds": ...}, and first of all {"ready": version}.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its log on standard output
    import vllm  # pyright: ignore[reportMissingImports]

    model = vllm.LLM(**json.loads(sys.argv[1]))
    print(json.dumps({"ready": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        start = time.perf_counter()
        model.generate(prompts, settings, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main()
