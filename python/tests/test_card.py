"""The official model card's own example. The imports are ours; where there is no GPU the device is the
CPU; the checkpoint is one that is here."""

import importlib.util

import pytest

from conftest import BUNDLED, GOLDEN, TINY, cuda_missing

CARD = '''
model = AutoModelForCausalLM.from_pretrained("zhixuan-lin/delta_net-760m-longcrawl64-48b")
tokenizer = AutoTokenizer.from_pretrained("zhixuan-lin/delta_net-760m-longcrawl64-48b", add_bos_token=True, clean_up_tokenization_spaces=False)

# Generation using HF api
prompt = "The best thing to do in San Francisco is"
model = model.cuda()
encoded = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
    output = model.generate(
        encoded,
        max_new_tokens=30,
    )[0]
pred = tokenizer.decode(output, skip_special_tokens=True)
print(pred)

# Of course you can also compute the logits or loss given proper inputs
batch_size, seq_len = encoded.shape
labels = encoded
input_ids = torch.roll(labels, shifts=1, dims=-1)
input_ids[:, 0] = tokenizer.bos_token_id  # 50256
out = model(input_ids=input_ids, labels=labels)
assert out.loss.size() == (batch_size, seq_len)
# Logits are not returned (to save memory) if labels are given
assert out.logits is None
# To get logits don't provide labels
out = model(input_ids=input_ids)
assert out.logits.size() == (batch_size, seq_len, tokenizer.vocab_size)
'''


def run(imports, directory):
    text = CARD.replace("zhixuan-lin/delta_net-760m-longcrawl64-48b", str(directory))
    names = {}
    exec(imports + (text.replace("cuda", "cpu") if cuda_missing() else text), names)
    return names


@pytest.fixture(params=["bundled", "golden"])
def checkpoint(request, tmp_path):
    """The bundled model; a golden checkpoint of 256 ids with a tokenizer of as many put beside it."""
    if request.param == "bundled":
        return BUNDLED
    import json

    for file in (GOLDEN / "delta_net-tiny").iterdir():
        (tmp_path / file.name).symlink_to(file)
    vocabulary = json.loads((TINY / "vocab.json").read_text())
    single = sorted((t for t in vocabulary if len(t) == 1), key=vocabulary.get)
    names = [*single[:255], "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text((TINY / "tokenizer_config.json").read_text())
    return tmp_path


# With torch there, the tokenizer's tensors are torch's, and on a GPU only torch can work on them.
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is not None and not cuda_missing(), reason="torch is installed"
)
def test_runs_without_torch(checkpoint, capsys):
    names = run("from deltafox import AutoModelForCausalLM, AutoTokenizer, _torch as torch\n", checkpoint)
    printed = capsys.readouterr().out
    assert printed == names["pred"] + "\n"
    assert printed.startswith("The best thing to do in San Francisco is")
    assert names["output"].shape[0] <= names["seq_len"] + 30


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_runs_with_torch(checkpoint):
    imports = "from deltafox import AutoModelForCausalLM, AutoTokenizer\nimport torch\n"
    names = run(imports, checkpoint)
    assert type(names["output"]).__module__ == "torch"
