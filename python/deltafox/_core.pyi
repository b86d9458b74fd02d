"""The C++ library, with NumPy arrays: see include/deltafox for what each function does."""

from typing import Callable, Dict, List, Optional, Tuple, Union

import numpy as np
from numpy.typing import NDArray

__version__: str

class Error(ValueError): ...

class State:
    @property
    def position(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def copy(self) -> State: ...

class ModelInfo:
    directory: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_parameters: int
    num_non_embedding_parameters: int
    weight_bytes: int
    state_bytes: int
    bos_token_id: Optional[int]
    eos_token_ids: List[int]
    pad_token_id: Optional[int]
    config_json: str
    random_weights: bool

class Model:
    def __init__(
        self, path_or_id: str, dtype: Optional[str], device: str, threads: int, revision: str
    ) -> None: ...
    @property
    def info(self) -> ModelInfo: ...
    def new_state(self) -> State: ...
    def save_state(self, state: State, path: str) -> None: ...
    def load_state(self, path: str) -> State: ...
    def forward(
        self,
        ids: NDArray[np.int32],
        cu_seqlens: NDArray[np.int64],
        states: List[State],
        last_logits: Optional[NDArray[np.float32]],
    ) -> None: ...
    def logits(
        self,
        ids: NDArray[np.int32],
        cu_seqlens: NDArray[np.int64],
        states: List[State],
        places: NDArray[np.int64],
        out: Optional[NDArray[np.float32]],
        hidden: List[Optional[NDArray[np.float32]]],
    ) -> None: ...
    def loss(
        self,
        ids: NDArray[np.int32],
        cu_seqlens: NDArray[np.int64],
        labels: NDArray[np.int32],
        states: List[State],
        out: NDArray[np.float32],
    ) -> None: ...

class Weight:
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def trainable(self) -> bool: ...
    def view(self) -> np.ndarray: ...
    def dlpack(self) -> object: ...

class Tokenizer:
    add_bos_token: bool
    def __init__(self, directory: str) -> None: ...
    def encode(self, text: str, add_special_tokens: bool) -> List[int]: ...
    def decode(self, ids: List[int], skip_special_tokens: bool) -> str: ...
    @property
    def escapes_json(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> Optional[int]: ...
    @property
    def eos_token_id(self) -> Optional[int]: ...
    def is_special(self, id: int) -> bool: ...

class GenerationConfig:
    max_new_tokens: Optional[int]
    max_length: Optional[int]
    min_new_tokens: int
    min_length: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: Optional[float]
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    renormalize_logits: bool
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: Union[bool, str]
    num_return_sequences: int
    eos_token_id: Optional[List[int]]
    pad_token_id: Optional[int]
    stop_strings: List[str]
    seed: Optional[int]
    output_logprobs: bool
    def __init__(self, other: GenerationConfig = ...) -> None: ...
    @staticmethod
    def load(directory: str) -> GenerationConfig: ...
    def validate(self) -> None: ...

class GeneratedSequence:
    @property
    def prompt(self) -> int: ...
    @property
    def new_ids(self) -> NDArray[np.int32]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def stop_string(self) -> str: ...
    @property
    def logprobs(self) -> NDArray[np.float32]: ...
    @property
    def model_logprobs(self) -> NDArray[np.float32]: ...
    @property
    def score(self) -> Optional[float]: ...
    @property
    def state(self) -> Optional[State]: ...

def weights(model: Model) -> List[Weight]: ...
def generate(
    model: Model,
    prompts: List[NDArray[np.int32]],
    config: GenerationConfig,
    tokenizer: Optional[Tokenizer],
    skip_special_tokens: bool,
    keep_stop_string: bool,
    initial_states: List[State],
    return_states: bool,
    on_token: Optional[Callable[[int, int, str, float, Optional[str]], Optional[bool]]],
) -> List[GeneratedSequence]: ...
def pad_token_id(model: Model, config: GenerationConfig) -> int: ...
def loss_and_gradients(
    model: Model,
    ids: NDArray[np.int32],
    cu_seqlens: NDArray[np.int64],
    labels: NDArray[np.int32],
    loss: NDArray[np.float32],
    recompute: bool,
) -> Dict[str, NDArray[np.float32]]: ...
def train(
    path: str,
    overrides: List[str],
    threads: int,
    device: str,
    on_step: Callable[[dict], Optional[bool]],
    on_note: Callable[[str], None],
    on_validation: Callable[[int, int], None],
) -> Tuple[str, int, bool]: ...
def resolve(path_or_id: str, revision: str) -> str: ...
def pull(
    id: str, revision: str, on_progress: Optional[Callable[[str, int, int], None]]
) -> str: ...
