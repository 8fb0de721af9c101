"""minitune beside torchtune, TRL and plain transformers + PEFT: the same rows and steps, by turns, each in its own process.

    PEERS_ROOT=... python bench/beside.py [WORD ...] [--repeats 3] [--table]

PEERS_ROOT is the folder that the peers' scripts were set up in (their README says how), with `bench/peer_minitune.py` beside
them. Words keep only the jobs that have them all, e.g. `lora_packed bfloat16`. Every run is appended to $PEERS_ROOT/beside.jsonl,
of which --table prints all: tokens for each second of CPU time over all threads, median and spread; peak memory of the steps; the
share of the limit, which is the matmuls of the step at the best rate measured here (limit.py), labelled rows of the head alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["PEERS_ROOT"])
OUT = ROOT / "beside.jsonl"
ALL, PAIR = ("minitune", "raw", "torchtune", "trl"), ("minitune", "raw", "torchtune")
JOBS = [  # arguments, peers
    ("lora_packed --dtype bfloat16", ALL),
    ("lora_packed --dtype bfloat16 --compile", ("minitune", "raw")),
    ("lora_packed --dtype bfloat16 --model tiny", PAIR),
    ("lora --dtype bfloat16", PAIR),
    ("full_packed --dtype bfloat16", PAIR),
    ("qlora --dtype bfloat16", PAIR),
    ("dpo --dtype bfloat16", ALL),
    ("kd --dtype bfloat16", ALL),
    ("lora_packed --dtype float32", PAIR),
    ("lora --dtype float32", PAIR),
    ("full_packed --dtype float32", PAIR),
    ("qlora --dtype float32", PAIR),
    ("dpo --dtype float32", PAIR),
    ("kd --dtype float32", PAIR),
]


def python(peer: str) -> str:
    """The interpreter of a peer's environment; minitune runs in this one."""
    if peer == "minitune":
        return sys.executable
    return str(ROOT / ("venv-tune" if peer == "torchtune" else "venv-hf") / "bin" / "python")


def run(peer: str, job: str) -> None:
    words = [python(peer), str(ROOT / "scripts" / f"peer_{peer}.py"), *job.split(), "--steps", "6"]
    environment = {**os.environ, "PEERS_RESULTS": str(ROOT / "one.jsonl"), "PYTHONWARNINGS": "ignore"}
    (ROOT / "one.jsonl").unlink(missing_ok=True)
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        print(f"{peer} {job}: not done in 300 s", flush=True)
        return
    if done.returncode or not (ROOT / "one.jsonl").is_file():
        print(f"{peer} {job}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}", flush=True)
        return
    record = json.loads((ROOT / "one.jsonl").read_text("utf-8").splitlines()[-1])
    with OUT.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**record, "job": job}) + "\n")
    print(f"{peer} {job}: {record['tokens_per_core_s']} tokens/core-s, {record['peak_rss_mib']} MiB", flush=True)


def table() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import limit  # of the peers' scripts

    limits = [json.loads(path.read_text("utf-8")) for path in ROOT.glob("limit*.json")]
    best = {key: max(one[key] for one in limits) for key in limits[0] if key.startswith("peak_")}
    best["copy"] = {"1024 MiB": {"copy_gbs_per_core": max(one["copy"]["1024 MiB"]["copy_gbs_per_core"] for one in limits)}}
    records: dict[tuple[str, str], list[dict]] = {}
    for line in OUT.read_text("utf-8").splitlines():
        record = json.loads(line)
        records.setdefault((record["job"], record["peer"]), []).append(record)
    print("| task | " + " | ".join(ALL) + " | against the best |\n|" + "---|" * (len(ALL) + 2))
    for job, peers in JOBS:
        if not any((job, peer) in records for peer in ALL):
            continue
        cells, rates, peaks = [], {}, {}
        for peer in ALL:
            runs = records.get((job, peer), [])
            if not runs:
                cells.append("" if peer not in peers else "failed")
                continue
            speeds = [one["tokens_per_core_s"] for one in runs]
            rates[peer], peaks[peer] = statistics.median(speeds), statistics.median(one["peak_rss_mib"] for one in runs)
            tokens = sum(shape[2] for shape in {tuple(shape) for shape in runs[0]["shapes"][2:]})
            share = limit.floor_core_s(runs[0], best, masked_head=True, no_padding=True) / (tokens / rates[peer])
            cells.append(f"{rates[peer]:.0f} ±{(max(speeds) - min(speeds)) / 2:.0f} / {peaks[peer]:.0f} / {share:.0%}")
        others = [peer for peer in rates if peer != "minitune"]
        if "minitune" in rates and others:
            faster = rates["minitune"] / max(rates[peer] for peer in others)
            cells.append(f"{faster:.2f}x, {peaks['minitune'] / min(peaks[peer] for peer in others):.2f}x memory")
        print(f"| {job.replace('--dtype ', '').replace('--', '')} | " + " | ".join(cells) + " |")
    print(f"\npeak GFLOP/s a core: {best['peak_bfloat16_per_core']} bfloat16, {best['peak_float32_per_core']} float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    args = parser.parse_args()
    for _ in range(0 if args.table else args.repeats):
        for job, peers in JOBS:
            for peer in peers:
                if all(word in f"{peer} {job}".split() for word in args.words):
                    run(peer, job)
    table()


if __name__ == "__main__":
    main()
