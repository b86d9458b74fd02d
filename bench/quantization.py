#!/usr/bin/env python3
"""What weights of fewer bits cost: loss and KL divergence to float32 on given tokens.

    bench/quantization.py --deltafox build/cpu/deltafox --model DIR --text FILE [--tokens 1024]
    bench/quantization.py --deltafox build/cpu/deltafox --model DIR --input-ids 464,3139,286

Prints JSON: for each dtype the mean loss in nats per token, its difference to float32, the mean KL
divergence of the next token's distribution from float32's, and how often the likeliest token is the
same. Needs numpy.
"""
import argparse
import json
import os
import struct
import subprocess
import tempfile

import numpy as np


def read_tensor(path, name):
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(length))[name]
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        return np.frombuffer(file.read(end - begin), dtype=np.float32).reshape(entry["shape"])


def token_ids(args):
    if args.input_ids:
        return [int(i) for i in args.input_ids.split(",")]
    with open(args.text, encoding="utf-8") as file:
        text = file.read()
    out = subprocess.run([args.deltafox, "tokenize", "--model", args.model, text],
                         check=True, capture_output=True, text=True).stdout
    return [int(i) for i in out.replace(",", " ").split()][: args.tokens]


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--deltafox", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text")
    parser.add_argument("--input-ids")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtypes", default="bfloat16,int8,int4")
    args = parser.parse_args()
    ids = token_ids(args)
    labels = np.array(ids[1:])
    exact = None
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "logits.safetensors")
        for dtype in ["float32"] + args.dtypes.split(","):
            subprocess.run([args.deltafox, "logits", "--model", args.model, "--dtype", dtype,
                            "--input-ids", ",".join(map(str, ids)), "--output", path],
                           check=True, capture_output=True)
            logits = read_tensor(path, "logits")
            logs = log_softmax(logits.reshape(-1, logits.shape[-1])[: len(labels)])
            loss = -logs[np.arange(len(labels)), labels].mean()
            if exact is None:
                exact, exact_loss = logs, loss
            kl = (np.exp(exact) * (exact - logs)).sum(axis=-1).mean()
            same = (exact.argmax(axis=-1) == logs.argmax(axis=-1)).mean()
            results[dtype] = {"loss": loss, "loss_difference": loss - exact_loss, "kl": kl,
                              "same_likeliest_token": same}
    print(json.dumps({"model": args.model, "tokens": len(ids), "results": results}, indent=1))


if __name__ == "__main__":
    main()
