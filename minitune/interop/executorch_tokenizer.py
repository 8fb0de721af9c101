"""Comparison of the tokenizer beside an ExecuTorch program, as ExecuTorch's runner reads it, with
minitune's.
"""

from collections.abc import Sequence
from pathlib import Path

from minitune.errors import InputError
from minitune.text.chat import encode_prompt
from minitune.text.template import Template, render
from minitune.text.tokenizer import Tokenizer

FILES = ("tokenizer.json", "tokenizer.model")  # that the runner reads
PROBE = "Who are you?  7 lamps, 1,234 kg: für Ærø.\n\tIt's 東京 🙂"


def notes(folder: Path, tokenizer: Tokenizer, template: Template) -> list[str]:
    """Lines on the tokenizer in a folder, if the runner can't read it or finds other tokens in a
    prompt.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        return [
            f"the folder has no {' and no '.join(FILES)}, one of which ExecuTorch's runner reads; "
            "bring it one, or give the program tokens"
        ]
    text, wanted = _prompt(tokenizer, template)
    try:
        found = _ids_of_runner(file, text, tokenizer)
    except RuntimeError as error:
        return [
            f"ExecuTorch's runner can't read {file.name} ({error}); bring it another tokenizer, or "
            "give the program tokens"
        ]
    if found == wanted:
        return []
    differs = [one != other for one, other in zip(found, wanted, strict=False)]
    n = differs.index(True) if any(differs) else len(differs)
    at = tokenizer.decode(wanted[n : n + 3], skip_special=False)
    return [
        f"ExecuTorch's runner reads {file.name} in another way: its tokens of a prompt differ from "
        f"minitune's from {at!r} on, so that its answers do too"
    ]


def _prompt(tokenizer: Tokenizer, template: Template) -> tuple[str, list[int]]:
    """Text of a prompt, and minitune's tokens of it: a message where the template takes one."""
    messages = [{"role": "user", "content": PROBE}]
    try:
        text = render(template, messages, add_generation_prompt=True)
        return text, list(encode_prompt(tokenizer, template, messages))
    except InputError:
        return PROBE, tokenizer.encode(PROBE, parse_special=False)


def _ids_of_runner(file: Path, text: str, tokenizer: Tokenizer) -> Sequence[int]:
    """Tokens of a text in ExecuTorch's own tokenizers; RuntimeError for a file that they can't
    read.
    """
    from pytorch_tokenizers import CppHFTokenizer, CppSPTokenizer

    if file.name == "tokenizer.json":
        reader = CppHFTokenizer()
        reader.load(str(file))
        return list(reader.encode(text, 0, 0))
    reader = CppSPTokenizer()
    reader.load(str(file))
    # sentencepiece takes no text for bos: the runner is asked for it by num_bos = 1
    bos = tokenizer.special_names.get("bos_token", "")
    n_bos = int(bool(bos) and text.startswith(bos))
    return list(reader.encode(text.removeprefix(bos), n_bos, 0))
