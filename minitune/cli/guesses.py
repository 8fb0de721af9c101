"""Words and files that people bring from other tools, and what does the same here."""

import re
from pathlib import Path

NAMES = {
    "run": "a program is run by its name alone: {me} lora, or {me} PROGRAM.toml",
    "train": "training is a program: {me} sft model.path=FOLDER data.train.path=FILE",
    "fuse": "an adapter is merged by {me} merge ADAPTER",
    "evaluate": "evaluation is a program: {me} eval FOLDER",
    "generate-text": "answers come from {me} generate FOLDER or {me} chat FOLDER",
    "serve": "nothing here serves a model: vLLM, transformers and llama.cpp open what a run saved; "
    "{me} chat FOLDER talks with it in a terminal",
    "export": 'exporting is a stage: [[stage]] op = "export", as in programs/quantize.toml',
    "push": "a folder goes to the Hub by {me} upload FOLDER OWNER/NAME",
    "look": "curves, figures and samples of a run are on the page of {me} report RUN",
    "compare": "runs stand beside each other on the page of {me} report RUN RUN",
    "resume": "a run that was stopped goes on with the command that started it",
    "list": "the shipped programs are listed by {me} ls",
    "new": "a program of your own begins as a copy: {me} cp lora mine.toml",
    "config": "a program with every default written out: {me} show PROGRAM",
    "validate": "a program is checked, and nothing run, by {me} check PROGRAM",
    "estimate": "memory and operations of a program: {me} plan PROGRAM",
    "preview": "text, ids and mask of a program's data: {me} show-sample PROGRAM",
    "pull": "a model comes from the Hub by {me} download OWNER/NAME",
    "info": "what a folder holds is told by {me} inspect FOLDER",
    "version": "the version is told by {me} --version",
}
ALIASES = {
    "run": ("start", "launch", "exec", "tune", "accelerate", "torchrun"),
    "train": ("finetune", "fine-tune", "fine_tune", "fit", "qlora-train", "pretrain"),
    "fuse": ("merge-lora", "merge_lora", "merge-adapter"),
    "evaluate": ("test", "benchmark", "bench", "score", "lm_eval", "lm-eval"),
    "generate-text": ("infer", "inference", "predict", "complete", "prompt", "ask"),
    "serve": ("server", "api", "deploy"),
    "export": ("convert", "gguf", "awq", "gptq", "convert-to-gguf"),
    "push": ("push-to-hub", "push_to_hub", "publish", "share"),
    "look": ("summary", "summarize", "logs", "log", "metrics", "plot", "results", "status"),
    "compare": ("diff",),
    "resume": ("continue", "restart"),
    "list": ("programs", "recipes", "configs"),
    "new": ("init", "copy", "create"),
    "config": ("cat", "print", "explain"),
    "validate": ("lint", "dry-run", "dryrun"),
    "estimate": ("memory", "profile", "vram"),
    "preview": ("tokenize", "preprocess", "sample", "samples", "dataset"),
    "pull": ("get", "fetch", "install", "clone"),
    "info": ("describe", "model", "view"),
    "version": ("-v", "-V", "--verbose-version"),
}
HINTS = NAMES | {alias: NAMES[name] for name, aliases in ALIASES.items() for alias in aliases}


TORCHTUNE = "that is torchtune's; docs/from-torchtune.md has the program and the keys here"
# recipes of torchtune, and options of its `tune run`
TORCHTUNE_WORDS = re.compile(
    r"\w+_(single_device|distributed|full_finetune)|eleuther_eval|--(config|nproc[-_]per[-_]node|nnodes)"
)


def hint(word: str, me: str) -> str | None:
    """Sentence on what does here what a word does elsewhere; `me` starts this program."""
    if TORCHTUNE_WORDS.fullmatch(word.casefold().partition("=")[0]):
        return TORCHTUNE
    sentence = HINTS.get(word.casefold())
    return sentence.format(me=me) if sentence is not None else None


YAML_SUFFIXES = (".yaml", ".yml")
# (a key that such files have, what they are, the page for those who come from that tool)
YAML_TOOLS = (
    ("_component_", "a torchtune config", "docs/from-torchtune.md"),
    ("base_model", "an Axolotl config", "docs/from-trl.md"),
    ("model_name_or_path", "a config of TRL or LLaMA-Factory", "docs/from-trl.md"),
)


def yaml_hint(file: Path, me: str) -> str:
    """End of a message about a YAML file given as a program: whose it is, and what to do."""
    text = file.read_text(encoding="utf-8", errors="replace")
    for key, what, page in YAML_TOOLS:
        if re.search(rf"^[ \t-]*{key}[ \t]*:", text, re.MULTILINE):
            return f"is {what}, expected a program in TOML; {page} says what its keys are here"
    return f"is a YAML file, expected a program in TOML; begin with `{me} cp lora mine.toml`"
