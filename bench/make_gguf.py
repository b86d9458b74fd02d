#!/usr/bin/env python3
"""A Transformer (LLaMA) checkpoint of deltafox as GGUF files that llama.cpp runs: the same model, as a
peer to measure against.

    deltafox init transformer_llama-760m --dtype bfloat16 --output DIR
    bench/make_gguf.py --model DIR --output OUT [--quantize BIN/llama-quantize]

Writes OUT/bf16.gguf and, with llama.cpp's quantiser, OUT/q8_0.gguf and OUT/q4_0.gguf. Needs the packages
numpy and gguf (pip install gguf) and GPT-2's vocabulary (--vocabulary).
"""

import argparse
import json
import pathlib
import subprocess

import gguf
import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUANTIZED = {"q8_0": "Q8_0", "q4_0": "Q4_0"}


def read_safetensors(path: pathlib.Path) -> dict[str, numpy.ndarray]:
    """Every tensor, bfloat16 ones as uint16."""
    kinds = {"F32": numpy.float32, "BF16": numpy.uint16}
    data = numpy.memmap(path, mode="r", dtype=numpy.uint8)
    header_size = int(data[:8].view(numpy.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + header_size]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
        tensors[name] = data[begin:end].view(kinds[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def as_float32(values: numpy.ndarray) -> numpy.ndarray:
    if values.dtype == numpy.float32:
        return values
    return (values.astype(numpy.uint32) << 16).view(numpy.float32)


def interleaved(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of each head in the order of llama.cpp's rotary embedding, which turns neighbours; ours turns
    the halves of a head against each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors_of_llama(tensors: dict[str, numpy.ndarray], config: dict):
    """(name, values) of each tensor as llama.cpp names and lays it out."""
    heads = config["num_heads"]
    key_heads = config["num_kv_heads"] or heads
    yield "token_embd.weight", tensors["model.embeddings.weight"]
    yield "output_norm.weight", tensors["model.norm.weight"]
    yield "output.weight", tensors["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        yield theirs + "attn_norm.weight", tensors[ours + "attn_norm.weight"]
        yield theirs + "attn_q.weight", interleaved(tensors[ours + "attn.q_proj.weight"], heads)
        yield theirs + "attn_k.weight", interleaved(tensors[ours + "attn.k_proj.weight"], key_heads)
        yield theirs + "attn_v.weight", tensors[ours + "attn.v_proj.weight"]
        yield theirs + "attn_output.weight", tensors[ours + "attn.o_proj.weight"]
        yield theirs + "ffn_norm.weight", tensors[ours + "mlp_norm.weight"]
        gate, up = numpy.split(tensors[ours + "mlp.gate_proj.weight"], 2)
        yield theirs + "ffn_gate.weight", gate
        yield theirs + "ffn_up.weight", up
        yield theirs + "ffn_down.weight", tensors[ours + "mlp.down_proj.weight"]


def add_config(writer: gguf.GGUFWriter, config: dict, ffn: int) -> None:
    heads = config["num_heads"]
    writer.add_context_length(config["max_position_embeddings"] or 32768)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_kv_heads"] or heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_base"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: gguf.GGUFWriter, directory: pathlib.Path) -> None:
    vocabulary = json.loads((directory / "vocab.json").read_text())
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = (directory / "merges.txt").read_text().split("\n")
    end = vocabulary["<|endoftext|>"]
    kinds = [gguf.TokenType.CONTROL if i == end else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def write_bf16(model: pathlib.Path, vocabulary: pathlib.Path, path: pathlib.Path) -> None:
    config = json.loads((model / "config.json").read_text())
    tensors = read_safetensors(model / "model.safetensors")
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, config, tensors["model.layers.0.mlp.down_proj.weight"].shape[1])
    add_vocabulary(writer, vocabulary)
    for name, values in tensors_of_llama(tensors, config):
        if values.ndim == 1:
            writer.add_tensor(name, as_float32(values))
        elif values.dtype == numpy.uint16:
            writer.add_tensor(name, numpy.ascontiguousarray(values), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            raise SystemExit(f"{model}: tensor {name}: must be stored as bfloat16")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--quantize", type=pathlib.Path, help="llama.cpp's llama-quantize")
    parser.add_argument("--vocabulary", type=pathlib.Path, default=ROOT / "tests/data/gpt2")
    options = parser.parse_args()

    options.output.mkdir(parents=True, exist_ok=True)
    source = options.output / "bf16.gguf"
    write_bf16(options.model, options.vocabulary, source)
    if options.quantize:
        for name, kind in QUANTIZED.items():
            # --pure: every matrix in this type, as deltafox has it.
            command = [options.quantize, "--pure", source, options.output / f"{name}.gguf", kind]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
