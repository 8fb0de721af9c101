"""Greedy answers of vLLM, by its own interpreter: reads cases as JSON lines on stdin, writes one JSON line of ids for each.

A case: {"folder", "prompts": [[ids]], "n", "adapter": folder or null, "options": keywords of LLM}.
"""

import gc
import json
import os
import sys
import traceback

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def answers(case: dict) -> list[list[int]]:
    adapter = case.get("adapter")
    engine = LLM(
        case["folder"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=case.get("dtype", "float32"),
        max_model_len=case.get("max_model_len", 64),
        max_num_seqs=4,
        enable_lora=adapter is not None,
        **({"max_lora_rank": 16} if adapter else {}),
        **case.get("options", {}),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=case["n"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


for line in sys.stdin:
    try:
        result = {"ids": answers(json.loads(line))}
    except Exception as error:  # a case that fails says so, and the next one is run
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    print("RESULT " + json.dumps(result), flush=True)
