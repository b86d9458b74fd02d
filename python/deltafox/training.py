"""Training as a configuration says."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping

from . import _core


@dataclasses.dataclass
class TrainResult:
    """What `train` returns."""

    output_dir: str
    tokens: int  # trained on, in this run and those that it continued
    loss: float  # the mean of the last step, in nats a token; NaN if none was made
    finished: bool  # False if it was stopped

    @property
    def model(self):
        """The directory of the trained model, for from_pretrained; None if it was stopped."""
        return os.path.join(self.output_dir, "model") if self.finished else None


def train(config, overrides=None, *, device="cpu", threads=0, on_step=None, progress=True):
    """Trains a model from scratch, or further, and returns a TrainResult.

    config: the path of a YAML file (see configs/), or a dictionary of the same keys. overrides:
    values of single keys, {"optimizer.lr": 1e-3}. A run that was stopped goes on where it was when it
    is started again, to the same bits. device: "cpu" or "cuda".

    on_step: called after every step with a dictionary of tokens, max_tokens, loss, lr, grad_norm and
    tokens_per_second; returning False stops the run. What it raises, and Ctrl-C, stop it too: the
    step under way is finished and a checkpoint is written first. progress: a bar where tqdm is
    installed.
    """
    settings = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
    with tempfile.TemporaryDirectory() as folder, _Bar(progress) as bar:
        if isinstance(config, Mapping):
            path = os.path.join(folder, "config.json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(config, file, indent=2)
        else:
            path = os.fspath(config)
        last = {"loss": float("nan")}

        def step(report):
            last.update(report)
            bar.step(report)
            return on_step(report) if on_step is not None else None

        output_dir, tokens, finished = _core.train(
            path, settings, threads, device, step, bar.note, bar.validation
        )
    return TrainResult(output_dir, tokens, last["loss"], finished)


class _Bar:
    """A tqdm bar of the tokens; nothing where there is no tqdm."""

    def __init__(self, wanted):
        self.tqdm = self.bar = None
        if wanted:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.tqdm = tqdm

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def step(self, report):
        if self.tqdm is None:
            return
        if self.bar is None:
            self.bar = self.tqdm(total=report["max_tokens"], unit="tok", unit_scale=True)
        self.bar.set_postfix(loss=f"{report['loss']:.4f}", lr=f"{report['lr']:.3g}")
        self.bar.update(report["tokens"] - self.bar.n)

    def note(self, text):
        if self.bar is not None:
            self.bar.write(text)

    def validation(self, done, total):
        if self.bar is not None:
            self.bar.set_postfix(validation=f"{done / total:.0%}")
