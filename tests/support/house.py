"""The floors of the house: which modules lie on which, for the rules and for the README's picture."""

INTEROP, DEMO = 3.5, 9.0  # the side rooms: interop lies under the programs, the demo is made by all of them
FLOORS = {
    0.0: "__init__ types tree seeds paths toml arrays tensorfile heap hardware",
    1.0: "grad offload compiled float8 nf4 quant ops blockwise flex attention losses optim optim8 advance lora sampling moe",
    2.0: "models/__init__ models/rope models/decoder models/memory models/spelling models/multimodal models/llama models/mistral "
    "models/ministral3 models/qwen2 models/qwen3 models/gemma models/gemma2 models/gemma3 models/phi3 models/olmo2 models/olmo3 "
    "models/smollm3 models/granite models/experts models/mxfp4 models/mixtral models/qwen2_moe models/qwen3_moe models/olmoe "
    "models/gpt_oss models/llama4 checkpoint vocabulary tokenizer template chat source packing documents data pairs",
    3.0: "objectives balance steps sweep private generate frozen calibrate scoring costs",
    INTEROP: "interop/__init__ interop/peft interop/peft_experts interop/compressed interop/gguf "
    "interop/gguf_blocks interop/gguf_vocab interop/bitsandbytes interop/harness",
    4.0: "world stages/__init__ stages/base stages/feed stages/adapt stages/loop stages/train stages/sweeping "
    "stages/measure stages/write log program report runs talk sample plan folders hub __main__",
    DEMO: "demo/__init__ demo/__main__ demo/orders demo/words demo/texts demo/pairs",
}
