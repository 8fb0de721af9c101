"""Skill verb: a page that tells a coding agent how to use minitune, made from the help of the
verbs, so that the two say the same.
"""

from minitune.cli.help import EXIT_CODES
from minitune.cli.options import typed_name
from minitune.cli.verbs import CHANGES, VERBS
from minitune.io import paths, toml

OPENING = """\
---
name: minitune
description: Fine-tune open language models (SFT, LoRA, DPO, distillation, quantization) from the \
command line, with one TOML program a run.
---

# minitune

A program is one TOML file: a model, its data, and stages that are run in order. A run leaves its
results in `runs/NAME`. The same command continues a run that was stopped, and shows the table of
one that is finished.
"""
STEPS = """\
## Order of work

1. Take a shipped program and copy it, or name it with changes.
2. `check` finds every mistake in the program and its files before anything is loaded.
3. `data` says what the rows hold: lengths, targets, repeated and held-out samples, steps, time.
4. `show-sample` shows which tokens are trained; `plan` says whether a step fits into memory.
5. Run the program. Read `summary.json` in its folder, and `metrics.jsonl` for every step.
6. `report` writes a page of a run, or of several beside each other; `chat` talks with the result.

```bash
{me} cp lora mine.toml
{me} check mine.toml train.steps=100
{me} data mine.toml train.steps=100 --json
{me} show-sample mine.toml -n 1
{me} plan mine.toml
{me} mine.toml train.steps=100 --json
{me} report runs/lora --json
```
"""
RULES = """\
## Rules

- {changes}
- Unknown keys are refused with the nearest name. `{me} PROGRAM --help` lists all keys of a
  program, `{me} schema` is the JSON Schema.
- Every command ends with one sentence on stderr where it fails, which says what to change.
- With `--json` stdout has one line, {{"exit_code": 0, "result": ...}}, or {{"exit_code": 2,
  "error": "..."}}; progress and tables go to stderr.
- No file of yours is overwritten: a path that holds one is refused before anything runs.
"""


def page() -> str:
    """Page in Markdown, with the header that agents look for: order of work, verbs, exit codes."""
    me = typed_name()
    lines = [OPENING, STEPS.format(me=me), RULES.format(me=me, changes=CHANGES)]
    lines += ["## Exit codes\n", *(f"- {code}: {meaning}" for code, meaning in EXIT_CODES.items())]
    lines += ["\n## Verbs\n"]
    lines += [f"- `{me} {verb.usage}`: {verb.summary}" for verb in VERBS.values()]
    lines += ["\n## Shipped programs\n"]
    for name, path in paths.shipped().items():
        comment = next(iter(toml.opening_comment(path, "program")), "")
        lines.append(f"- `{name}`: {comment}".rstrip(": "))
    return "\n".join(lines) + "\n"
