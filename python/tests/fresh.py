"""Run by a Python that has nothing but the wheel and NumPy: generates with the checkpoint given."""

import sys
from importlib.metadata import distributions

from deltafox import AutoModelForCausalLM, AutoTokenizer

present = {d.metadata["Name"] for d in distributions()} - {"pip", "setuptools", "wheel"}
assert present == {"deltafox", "numpy"}, present
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], add_bos_token=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
output = model.generate(ids, max_new_tokens=8)
assert output.size() == (1, ids.size(1) + 8)
print(tokenizer.decode(output[0], skip_special_tokens=True))
