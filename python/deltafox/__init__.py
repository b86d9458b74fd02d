"""Language models of the Forgetting Transformer paper, with Hugging Face's names.

    from deltafox import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("zhixuan-lin/delta_net-760m-longcrawl64-48b")
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, add_bos_token=True)
    ids = tokenizer("The best thing to do in San Francisco is", return_tensors="np").input_ids
    print(tokenizer.decode(model.generate(ids, max_new_tokens=30)[0], skip_special_tokens=True))

Letters in shapes: B sequences, T tokens, N vocabulary, C hidden size.

Arrays that are given may be NumPy's, torch's, lists, or any that speak DLPack. What comes back is of
the kind of the input: torch tensors for torch tensors, else NumPy arrays.
"""

from . import _core
from ._arrays import torch_module as _torch_module
from ._core import Error
from .cache import Cache
from .generation import GenerateOutput, GenerationConfig, set_seed
from .hub import pull
from .model import AutoModelForCausalLM, CausalLM, CausalLMOutput
from .parameter import Parameter
from .tokenizer import AutoTokenizer, BatchEncoding, Tokenizer
from .training import TrainResult, train

Error.__module__ = "deltafox"

__version__ = _core.__version__

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "Cache",
    "CausalLM",
    "CausalLMOutput",
    "Error",
    "GenerateOutput",
    "GenerationConfig",
    "Parameter",
    "Tokenizer",
    "TrainResult",
    "pull",
    "set_seed",
    "train",
]


def __getattr__(name):
    # `from deltafox import torch`: torch itself where it is installed, else the little of it that
    # the model cards use. Only then, because importing torch takes seconds.
    if name == "torch":
        return _torch_module()
    raise AttributeError(f"module 'deltafox' has no attribute '{name}'")
