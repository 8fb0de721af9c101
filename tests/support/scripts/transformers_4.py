"""Logits of every folder in ROOT/NAME by transformers 4.57, and each model saved anew: words ROOT NAME."""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

assert transformers.__version__.startswith("4.57."), transformers.__version__
root, name = Path(sys.argv[1]), sys.argv[2]
tokens = load_file(root / "tokens")["tokens"]
for folder in sorted((root / name).iterdir()):
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(report.values()), (folder, report)
    with torch.no_grad():
        save_file({"logits": model.eval()(tokens).logits}, root / f"{name} {folder.name}")
    model.save_pretrained(root / "theirs" / folder.name)
