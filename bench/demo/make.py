"""Makes everything in minitune/demo/ from a seed: `python bench/demo/make.py` (at most three quarters of an hour on two cores).

1. the tasks' data, orders-train.jsonl, orders-heldout.jsonl and orders-pairs.jsonl;
2. the pretraining text, in runs/demo-data/pretrain.jsonl;
3. the tokenizer, trained on both (the held-out rows excepted), in model/;
4. the base model and the student, pretrained by programs/demo/pretrain.toml and copied to model/ and student/.
"""

import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from minitune.io import paths
from minitune.io.atomic import write_atomic
from minitune.io.results import MARKER
from minitune.programs import program
from minitune.programs.run import run_program
from orders import HELDOUT, TASK, TRAIN, rows
from pairs import pair_rows
from texts import pretraining_texts

SEED = 0
N_TRAIN, N_HELDOUT, N_PAIRS = 5000, 240, 1500  # rows
N_PRETRAIN_CHARS, N_TOKENIZER_CHARS = 26_000_000, 3_000_000
VOCAB_SIZE = 1024
MARKERS = ("<|user|>", "<|assistant|>", "<|end|>")  # user-defined pieces: found in raw text, as the pretraining text has them
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DEMO = paths.locate("demo/model").parent
STUDENT = ("name=demo-student", "model.config=configs/models/demo-student.toml")  # the pretraining program, for the student
PRETRAIN_DATA = Path("runs/demo-data/pretrain.jsonl")


def train_rows() -> list[dict[str, str]]:
    """The rows of orders-train.jsonl."""
    return rows(SEED, "train", TASK, N_TRAIN)


def heldout_rows() -> list[dict[str, str]]:
    """The rows of orders-heldout.jsonl."""
    return rows(SEED, "heldout", HELDOUT, N_HELDOUT)


def preference_rows() -> list[dict[str, str]]:
    """The rows of orders-pairs.jsonl."""
    return pair_rows(SEED, N_PAIRS)


def tokenizer_texts() -> list[str]:
    """What the tokenizer is trained on: some of the pretraining text, and notes of every length with their JSON."""
    notes = rows(SEED, "train", TRAIN, 4000)
    return [*pretraining_texts(SEED, N_TOKENIZER_CHARS), *(text for row in notes for text in row.values())]


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A sentencepiece BPE model whose pieces hold no space, so that a word has the same pieces wherever it stands."""
    words = Counter(word for text in texts for word in re.split(r"\s|<\|\w+\|>", text) if word)
    lines = [f"{word}\t{count}" for word, count in sorted(words.items())] + [". .\t1"]  # the one line with a space: a piece too
    model = io.BytesIO()
    # From sentences it would learn pieces that begin with a space, and a name would change its pieces after a quote.
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        input_format="tsv",
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        required_chars="".join(map(chr, range(33, 127))),
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=[*MARKERS, "\n"],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: the special tokens, and a chat template that spends three tokens on a turn at most."""
    special = ("<unk>", "<s>", "</s>", "<pad>", *MARKERS)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {str(i): {"content": text, "special": True, **plain} for i, text in enumerate(special)},
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": False,  # the chat template writes it
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }


def write_jsonl(path: Path, objects: Iterable[Mapping[str, str]]) -> None:
    """One compact JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(one, separators=(",", ":")) + "\n" for one in objects)


def main() -> int:
    """Write the data and the tokenizer, pretrain the base model and the student, and put them in their places."""
    write_jsonl(DEMO / "orders-train.jsonl", train_rows())
    write_jsonl(DEMO / "orders-heldout.jsonl", heldout_rows())
    write_jsonl(DEMO / "orders-pairs.jsonl", preference_rows())
    # The tokenizer adds no bos, and the chat template begins with one: so the texts write it themselves.
    write_jsonl(PRETRAIN_DATA, ({"text": f"<s>{text}"} for text in pretraining_texts(SEED, N_PRETRAIN_CHARS)))

    model = DEMO / "model"
    model.mkdir(exist_ok=True)
    write_atomic(model / "tokenizer.model", train_tokenizer(tokenizer_texts()))
    write_atomic(model / "tokenizer_config.json", json.dumps(tokenizer_config(), indent=2).encode())

    for folder, changes in (("model", ()), ("student", STUDENT)):
        pretrain = program.load(paths.program_file("demo/pretrain"), [*changes, *sys.argv[1:]])
        summary = run_program(pretrain)
        shutil.copytree(summary["save"]["path"], DEMO / folder, ignore=shutil.ignore_patterns(MARKER), dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
