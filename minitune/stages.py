"""What a program can do: one frozen struct a stage, each with `run(world) -> world`. The union at the bottom is the registry."""

import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from minitune import chat, checkpoint, grad, objectives, optim, paths, tree
from minitune.data import Cursor, Report, Source, batches, prepare, prompts, take
from minitune.generate import greedy
from minitune.interop import peft
from minitune.lora import Lora
from minitune.losses import CrossEntropy, Loss
from minitune.steps import Step, eval_step, train_step
from minitune.types import Delta, Deltas, InputError, Mean, Metrics, Params, Trainable
from minitune.world import Stopped, World

Positive = Annotated[int, msgspec.Meta(gt=0)]
SKIPS = 20  # consecutive steps without a finite gradient after which a run stops


class _Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="op"):
    name: str | None = None  # what overrides and summary.json call it; the op if absent

    @property
    def label(self) -> str:
        """The stage's name in overrides, records and messages."""
        return self.name or str(self.__struct_config__.tag)

    def check(self, params: Params) -> None:
        """InputError for what is wrong before anything runs; params may be on the meta device."""

    def run(self, world: World) -> World:
        """The world after this stage."""
        raise NotImplementedError


class LoraStage(_Stage, frozen=True, kw_only=True, tag="lora"):
    """Put fresh low-rank deltas on the weights that the targets match; what trains afterwards is the deltas."""

    rank: Positive
    alpha: float
    targets: tuple[str, ...]

    @property
    def rule(self) -> Lora:
        """The rule that the deltas follow."""
        return Lora(self.rank, self.alpha, self.targets)

    def check(self, params: Params) -> None:
        """The targets match linear weights."""
        self.rule.names(params)

    def run(self, world: World) -> World:
        """world with trainable deltas."""
        if world.lora is not None:
            raise InputError(
                f"stages: {self.label} finds deltas on the model already, expected none; drop the stage or model.deltas"
            )
        deltas = self.rule.init(world.params, world.seed)
        n_trained = f"{_count(deltas):,} of {_count(world.params):,}"
        world.log.say(f"{self.label}: rank {self.rank} on {len(deltas)} weights, {n_trained} parameters train")
        return world._replace(lora=self.rule, trainable={**world.trainable, **deltas})


class Full(_Stage, frozen=True, kw_only=True, tag="full"):
    """Train the weights that the globs match whole, in float32, in place of the loaded ones."""

    weights: tuple[str, ...] = ("*",)

    def check(self, params: Params) -> None:
        """The globs match."""
        tree.select(params, self.weights, "full: weights")

    def run(self, world: World) -> World:
        """world with trainable weights."""
        params, trainable = objectives.full(world.params, self.weights)
        world.log.say(f"full: {len(trainable)} weights, {_count(trainable):,} of {_count(params):,} parameters train")
        return world._replace(params=params, trainable={**world.trainable, **trainable})


class Train(_Stage, frozen=True, kw_only=True, tag="train"):
    """Take optimizer steps on the trainable tree. The step is the only clock: it drives data, schedule, saves and logs."""

    data: str
    steps: Positive
    batch_size: Positive  # rows per optimizer step
    micro_batch_size: Positive | None = None  # rows per forward; the whole batch if absent
    loss: Loss = CrossEntropy()
    optimizer: optim.Optimizer = optim.AdamW(lr=1e-4)
    schedule: optim.Schedule = optim.Constant()
    clip_norm: optim.NonNegative = 1.0  # largest norm of the whole gradient; 0 leaves it as it is
    save_every: Positive = 100  # steps
    remat: bool = False  # recompute each block in the backward: less memory, a third more work

    def run(self, world: World) -> World:
        """world with the trained tree; continues from the newest state in the run folder."""
        if not world.trainable:
            raise InputError(f"stages: {self.label} finds nothing to train, expected a lora or full stage before it")
        source = world.data[self.data]
        dataset = prepare(source, world.tokenizer, world.template, paths.cache())
        world.log.say(f"{self.label}: {self.data} has {describe(dataset.report)}")
        optimizer = self._optimizer()
        step = self._step(world, optimizer)
        folder = world.folder / "checkpoints" / self.label
        state = {"trainable": world.trainable, "opt_state": optimizer.init(world.trainable)}
        done, cursor, clock = 0, Cursor(0, 0), _Clock(0.0, 0, 0, 0)
        if saved := checkpoint.committed(folder):
            state, meta = checkpoint.load_state(saved[-1], state)
            done, cursor, clock = meta["step"], Cursor(*meta["cursor"]), _Clock(*meta["clock"])
            world.log.say(f"{self.label}: continuing from step {done} of {self.steps}")
        world.log.rewind(done)

        skips, device = 0, _device(world.params, world.trainable)
        with world.log.progress(self.label, self.steps, done) as progress:
            while done < self.steps:
                started = time.perf_counter()
                batch, cursor = take(dataset, cursor, self.batch_size, source, world.seed)
                batch = tree.map(lambda x: x.to(device), batch)
                trainable, opt_state, metrics = step(world.params, state["trainable"], state["opt_state"], batch)
                state, done = {"trainable": trainable, "opt_state": opt_state}, done + 1
                row = self._row(done, metrics)
                n_tokens, time_s = int((batch.segment_ids > 0).sum()), time.perf_counter() - started
                clock = clock.add(time_s, n_tokens, int(row["skipped"]), peak_mem_bytes(device))
                row = {**row, "tokens_per_second": n_tokens / time_s, "mem_bytes": clock.peak_mem_bytes}
                progress.update(done, {name: row[name] for name in ("loss", "lr", "tokens_per_second", "mem_bytes")})
                world.log.metrics(done, row)

                skips = skips + 1 if row["skipped"] else 0
                stopping = world.stopping()
                if stopping or skips == SKIPS or done == self.steps or done % self.save_every == 0:
                    checkpoint.save_state(folder, done, state, {"cursor": list(cursor), "clock": list(clock)})
                if stopping and done < self.steps:
                    raise Stopped(done, folder)
                if skips == SKIPS:
                    raise InputError(
                        f"stages: {self.label} had {SKIPS} steps in a row without a finite gradient or a target token, "
                        f"up to step {done}; they changed nothing. Lower the learning rate, or look at the data"
                    )
        top = {"tokens_per_s": clock.n_tokens / clock.time_s, "peak_mem_bytes": clock.peak_mem_bytes, "steps": self.steps}
        record = {"top": top, "time_s": clock.time_s, "n_skipped": clock.n_skipped, "data": dataset.report._asdict()}
        return world._replace(trainable=state["trainable"]).record(self.label, record)

    def _optimizer(self) -> optim.Chain:
        clip = [optim.ClipByGlobalNorm(self.clip_norm)] if self.clip_norm else []
        return optim.chain(*clip, self.optimizer, optim.ScaleBySchedule(self.schedule, self.steps))

    def _step(self, world: World, optimizer: optim.Chain) -> Step:
        model = world.model._replace(wrap=grad.remat) if self.remat else world.model
        objective = objectives.sft(model, self.loss, world.lora)
        # donated: the trees are this stage's own, and the ones before the step are never asked for again
        return train_step(objective, optimizer, micro_batch=self.micro_batch_size or self.batch_size, donate=True)

    def _row(self, done: int, metrics: Metrics) -> dict[str, float]:
        """What is logged of a step, under the names that dashboards expect."""
        values = {name: float(value) for name, value in metrics.items()}
        lr = self.optimizer.lr * float(self.schedule.factor(torch.tensor(done - 1), self.steps))
        return {"loss": values.pop("loss_nats"), "lr": lr, **values}


class Eval(_Stage, frozen=True, kw_only=True, tag="eval"):
    """Held-out loss and, where the data has answers, exact match by greedy decoding."""

    data: str
    batch_size: Positive = 64  # rows per forward
    max_new_tokens: Positive = 256
    limit: Positive | None = None  # prompts to answer; all if absent
    samples: Annotated[int, msgspec.Meta(ge=0)] = 3  # answers to keep in the record and show

    def run(self, world: World) -> World:
        """world with a record of loss_nats (per target token) and exact_match (fraction of answers equal to the reference)."""
        if self.label in world.records:  # a resumed run: this was measured before the run died
            return world
        source = world.data[self.data]
        dataset = prepare(source, world.tokenizer, world.template, paths.cache())
        step = eval_step(objectives.sft(world.model, CrossEntropy(), world.lora))
        device = _device(world.params, world.trainable)
        total = Mean(torch.zeros((), device=device), torch.zeros((), device=device))
        for batch in batches(dataset, source, self.batch_size):
            total = tree.add(total, step(world.trainable, world.params, tree.map(lambda x: x.to(device), batch))[0])
        record: dict[str, Any] = {"loss_nats": float(total.value()), "target_tokens": int(total.weight)}
        if source.format != "text":
            record |= self._answer(world, source)
        shown = f", exact match {record['exact_match']:.1%} of {record['n_prompts']}" if "exact_match" in record else ""
        world.log.say(f"{self.label}: loss {record['loss_nats']:.4f} nats a token{shown}")
        return world.record(self.label, record)

    def _answer(self, world: World, source: Source) -> dict[str, Any]:
        params, deltas = objectives.attach(world.params, world.trainable, world.lora)
        asked = prompts(source, world.tokenizer, world.template)[: self.limit]
        order = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))  # like lengths together: less padding
        answers = [""] * len(asked)
        with world.log.progress(self.label, len(asked), 0) as progress:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                ids = [asked[i].ids for i in rows]
                stops = stop_ids(world.tokenizer, world.template)
                written = greedy(world.model, params, ids, deltas, max_new_tokens=self.max_new_tokens, stop_ids=stops)
                for i, row in zip(rows, written, strict=True):
                    answers[i] = world.tokenizer.decode(row, skip_special=True)
                progress.update(start + len(rows), {})
                if world.stopping():
                    raise Stopped(0, world.folder)  # nothing is lost: a resumed run evaluates again
        right = [answer.strip() == prompt.reference.strip() for answer, prompt in zip(answers, asked, strict=True)]
        samples = [
            {"prompt": prompt.messages[-1]["content"], "reference": prompt.reference, "answer": answer}
            for prompt, answer in zip(asked[: self.samples], answers, strict=False)
        ]
        return {"exact_match": sum(right) / len(right), "n_prompts": len(right), "samples": samples}


class Save(_Stage, frozen=True, kw_only=True, tag="save"):
    """Write the result: deltas as a PEFT adapter, or a whole Hugging Face folder (`merged` deltas, or `params`)."""

    what: Literal["deltas", "merged", "params"]
    path: str | None = None  # a folder; runs/<name>/<what> if absent
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the weights; as they were stored if absent

    def run(self, world: World) -> World:
        """world with a record of where the result lies."""
        folder = Path(self.path).expanduser() if self.path else world.folder / self.what
        deltas = {name: leaf for name, leaf in world.trainable.items() if isinstance(leaf, Delta)}
        if bool(deltas) != (self.what != "params"):
            held = "deltas" if deltas else "no deltas"
            raise InputError(
                f"stages: {self.label} is to save {self.what!r}, but the model holds {held}; expected 'params' without them"
            )
        record: dict[str, Any] = {"what": self.what, "path": str(folder)}
        if self.what == "deltas" and world.lora is not None:
            peft.save(folder, deltas, world.lora, str(world.source or world.tokenizer_folder))
        else:
            final, record["merge_error"] = self._weights(world, deltas)
            checkpoint.save_folder(
                folder,
                final,
                world.model,
                source=world.source,
                tokenizer=world.tokenizer_folder,
                template=world.template.source if world.template.origin.startswith("built-in") else None,
                stop_ids=stop_ids(world.tokenizer, world.template),
            )
        world.log.say(f"{self.label}: {self.what} in {folder}")
        return world.record(self.label, record)

    def _weights(self, world: World, deltas: Deltas) -> tuple[dict[str, Tensor], float]:
        """The weights to write and, after a merge in float32, the largest share of a weight's change that rounding lost."""
        dtype = getattr(torch, self.dtype) if self.dtype else world.stored
        whole = {name: leaf for name, leaf in world.trainable.items() if isinstance(leaf, Tensor)}
        # from the folder again: in memory the frozen weights may have been rounded to the dtype of compute
        source = world.params if world.source is None else checkpoint.load_params(world.source, world.model.shapes())
        base = {**source, **whole}
        if world.lora is None:
            return {name: w.to(dtype) for name, w in base.items()}, 0.0
        wide = {name: base[name].to(deltas[name].a.device, torch.float32) for name in deltas}
        final = {name: w.to(dtype) for name, w in {**base, **world.lora.merge(wide, deltas)}.items()}
        error = world.lora.merge_error(wide, deltas, final)
        world.log.say(f"{self.label}: rounding to {dtype} loses at most {error:.2%} of a weight's change")
        return final, error


Stage = LoraStage | Full | Train | Eval | Save


class _Clock(NamedTuple):
    time_s: float
    n_tokens: int
    n_skipped: int
    peak_mem_bytes: int

    def add(self, time_s: float, n_tokens: int, n_skipped: int, mem_bytes: int) -> "_Clock":
        return _Clock(
            self.time_s + time_s,
            self.n_tokens + n_tokens,
            self.n_skipped + n_skipped,
            max(self.peak_mem_bytes, mem_bytes),
        )


def stop_ids(tokenizer: Any, template: chat.Template) -> list[int]:
    """The tokens that end an answer: the special token that the template puts after an assistant's turn, and the end of text."""
    turn = chat.encode_chat(tokenizer, template, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    last = [i for i, trained in zip(turn.ids, turn.mask, strict=True) if trained][-1]
    ends = [last] if last in tokenizer.special.values() else []
    return list(dict.fromkeys([*ends, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]))


def peak_mem_bytes(device: torch.device) -> int:
    """The most memory so far: of the device's tensors if it is an accelerator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(report: Report) -> str:
    """A data report in words."""
    odd = {"truncated": report.n_truncated, "dropped": report.n_dropped, "without a target": report.n_without_target}
    told = "".join(f", {n:,} {what}" for what, n in odd.items() if n)
    return f"{report.n_samples:,} samples, {report.n_tokens:,} tokens, {report.n_target_tokens:,} of them targets{told}"


def _device(params: Params, trainable: Trainable) -> torch.device:
    return next((leaf.device for leaf in tree.leaves((params, trainable)) if not leaf.is_meta), torch.device("cpu"))


def _count(leaves: Any) -> int:
    return sum(leaf.numel() for leaf in tree.leaves(leaves))
