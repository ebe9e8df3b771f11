"""A report as a run on a 30-layer model would leave it, with every kind of row."""

import math
import random

import pytest

MECHANISMS = ("bigbird", "hip", "moba", "neighborhood", "s2_attention", "sink_window", "sparge", "xattention")
LAYERS, HEADS, CELLS = 30, 9, 64


def candidate_rows(rng):
    rows = []
    for number, mechanism in enumerate(MECHANISMS):
        for step, density in enumerate((0.06, 0.15, 0.4)):
            settings = {"block": 64, "budget": 512 * 2**step, "threshold": 0.9 + step / 100}
            inside = ", ".join(f"{name}={value}" for name, value in settings.items())
            rows.append({
                "mechanism": mechanism, "settings": settings, "label": f"{mechanism}({inside})",
                "seconds": 3.2 + 21 * density * (0.8 + 0.1 * number), "select_seconds": 0.12 * number,
                "density": density, "error": 0.5 * (1 - density) ** 2,
                "damage": 0.4 * math.exp(-9 * density) * rng.uniform(0.3, 2.0),
                "heads_using": 0,
                "layers_scored": LAYERS,
            })  # fmt: skip
    rows[-1]["damage"] = 1.1e-13
    return rows


def layer_rows(rng, candidates):
    rows = []
    for layer in range(LAYERS):
        groups = [["dense", "dense", 1.0, []]]
        groups += [
            [row["mechanism"], row["label"], row["density"] * rng.uniform(0.7, 1.3), []]
            for row in rng.sample(candidates, 2)
        ]
        for head in range(HEADS):
            rng.choice(groups)[3].append(head)
        choices = [
            {"heads": heads, "mechanism": mechanism, "label": label, "density": density,
             "min_tokens": 0 if mechanism == "dense" else 2048, "dtype": None}
            for mechanism, label, density, heads in groups if heads
        ]  # fmt: skip
        for row in candidates:
            row["heads_using"] += sum(len(c["heads"]) for c in choices if c["label"] == row["label"])
        rows.append(
            {"key": f"model.layers.{layer}.self_attn", "choices": choices, "dense_seconds": 0.8, "cache": "everything"}
        )
    return rows


def example(rng, layer, label):
    attention, pattern = [], []
    for i in range(CELLS):
        weights = [
            math.exp(-abs(i - j) / 3) + 3 * (j == 0) + 1e-4 * rng.random() if j <= i else 0.0 for j in range(CELLS)
        ]
        total = sum(weights)
        attention.append([round(math.log10(max(w / total, 1e-6)), 2) for w in weights])
        pattern.append([float(j <= i and (j < 2 or i - j < 8 or (i + 3 * j) % 17 == layer)) for j in range(CELLS)])
    return {"layer": f"model.layers.{layer}.self_attn", "head": layer % HEADS, "label": label, "density": 0.231,
            "mass": 0.987, "attention": attention, "pattern": pattern}  # fmt: skip


def target_rows():
    return [
        {"name": "prefill, against dense", "wanted": "at least 1.2×", "got": "1.31×", "met": True},
        {"name": "perplexity, against dense", "wanted": "at most 1.00 % more", "got": "+1.24 %", "met": False},
        {"name": "pass keys found", "wanted": "no fewer than dense (10) at any length", "got": "11 of 12", "met": True},
    ]


def passkey_rows():
    found = {1024: ("11", "11", "11"), 2048: ("10", "11", "11"), 4096: ("11", "01", "11"), 8192: ("01", "11", "11")}
    return [
        {"tokens": tokens, "cells": [{"tries": 1, "dense": int(dense), "tuned": int(tuned)} for dense, tuned in cells]}
        for tokens, cells in found.items()
    ]


@pytest.fixture
def report():
    rng = random.Random(0)
    candidates = candidate_rows(rng)
    layers = layer_rows(rng, candidates)
    front = [{"seconds": 24.0 - 1.05 * n, "damage": 0.0 if n == 0 else 6e-5 * math.exp(0.38 * n)} for n in range(20)]
    trials = [
        {"seconds": 11.4, "damage": 0.0057, "rise": 0.041, "passkey": "", "holds": False, "kept": False},
        {"seconds": 19.8, "damage": 0.00027, "rise": 0.0021, "passkey": "9/9, dense 8/9", "holds": True, "kept": False},
        {"seconds": 15.6, "damage": 0.0012, "rise": 0.0062, "passkey": "8/9, dense 8/9", "holds": True, "kept": True},
    ]
    used = [c for layer in layers for c in layer["choices"] if c["mechanism"] != "dense"]
    both = {"dense": 31.62, "tuned": 24.14}
    table = [
        {"name": "prefill, median", "dense": "31.62 s", "tuned": "24.14 s", "ratio": "0.763"},
        {"name": "one decoded token, median", "dense": "140.5 ms", "tuned": "143.1 ms", "ratio": "1.019"},
        {"name": "perplexity", "dense": "11.4814", "tuned": "11.6238", "ratio": "1.012"},
        {"name": "peak memory of a prefill", "dense": "412.5 MB", "tuned": "498.8 MB", "ratio": "1.209"},
        {"name": "mean KL(dense ‖ tuned), nats", "dense": "–", "tuned": "0.01131", "ratio": "–"},
    ]
    return {
        "version": 1, "saccade": "0.1.0", "made": "2026-01-02T03:04:05+00:00",
        "command": "saccade tune SmolLM2-135M-Instruct --context 8192 --budget 0.01 --out saccade-out/tune",
        "elapsed_seconds": 1830.5,
        "machine": {"processor": "Example CPU", "cores": 2, "threads": 2, "memory_bytes": 25276510208,
                    "system": "Linux x86_64", "python": "3.11.7", "torch": "2.13.0+cpu", "device": "cpu",
                    "gemm_gflops": 115.6},
        "model": {"name": "SmolLM2-135M-Instruct", "architecture": "LlamaForCausalLM", "layers": LAYERS,
                  "heads": HEADS, "kv_heads": 3, "head_dim": 64, "dtype": "float32", "weights": "84c0d0f4" * 8},
        "text": "built-in: documentation; 55,176 calibration and 36,658 held-out tokens",
        "settings": {"context": 8192, "budget": 0.01, "cache_budget": None, "seed": 0,
                     "confirmations": 4, "rounds": 3, "sampled": 4},
        "summary": {"prefill_speedup": 1.31, "prefill_speedup_each": [1.28, 1.31, 1.33], "prefill_seconds": both,
                    "decode_seconds": {"dense": 0.14, "tuned": 0.143}, "perplexity": {"dense": 11.48, "tuned": 11.62},
                    "perplexity_rise": 0.0124, "kl": 0.01131, "peak_bytes": {"dense": 412500000, "tuned": 498800000},
                    "kv_bytes": {"dense": 23961600, "tuned": 23961600},
                    "cache": {"dense": "DynamicCache", "tuned": "PagedCache: everything"},
                    "passkey": {"dense": 10, "tuned": 11}, "passkeys_asked": 12, "after_the_cut": None},
        "targets": target_rows(),
        "heldout": {"rounds": 3, "table": table, "notes": "Prefill speed-up in each round: 1.28×, 1.31×, 1.33×.",
                    "depths": [0.1, 0.5, 0.9],
                    "passkey": passkey_rows()},
        "time_split": [{"name": "dense", "kernel": 23.4, "select": 0.0, "rest": 8.1},
                       {"name": "tuned", "kernel": 13.2, "select": 2.6, "rest": 8.3}],
        "layers": layers, "candidates": candidates,
        "left_out": {"fope": "a position does not choose which pairs a layer computes", "gqa": "needs training",
                     "nsa": "needs training"},
        "search": {"dense_seconds": 24.0, "frontier": front, "confirmed": trials, "caches": []},
        "examples": [example(rng, n, used[n]["label"]) for n in range(6)],
    }  # fmt: skip


@pytest.fixture
def dense_report(report):
    """What is left where nothing pays: dense attention everywhere, no trial, no picture."""
    for layer in report["layers"]:
        layer["choices"] = [
            {
                "heads": list(range(HEADS)),
                "mechanism": "dense",
                "label": "dense",
                "density": 1.0,
                "min_tokens": 0,
                "dtype": None,
            }
        ]
    for row in report["candidates"]:
        row["heads_using"] = 0
    report["search"] |= {"confirmed": [], "frontier": [{"seconds": 24.0, "damage": 0.0}]}
    return report | {"examples": [], "command": ""}
