"""Checkpoints by hub id."""

from . import _core


def pull(id, revision="main", progress=True):
    """Downloads a checkpoint into the cache that huggingface_hub uses and returns its directory.

    What the cache holds is not fetched again, partial files are resumed, and every file is verified.
    With `progress`, shows bars where tqdm is installed.
    """
    with _Progress(progress) as on_progress:
        return _core.pull(id, revision, on_progress)


def directory_of(path_or_id, revision="main", local_files_only=False):
    """The directory of a checkpoint; downloads it if it is neither a directory nor in the cache."""
    try:
        return _core.resolve(path_or_id, revision)
    except _core.Error:
        if local_files_only or path_or_id.count("/") != 1 or path_or_id.startswith((".", "/", "~")):
            raise
    return pull(path_or_id, revision)


class _Progress:
    """A tqdm bar for each file; nothing where there is no tqdm."""

    def __init__(self, wanted):
        self.tqdm = self.bar = self.file = None
        if wanted:
            try:
                from tqdm.auto import tqdm

                self.tqdm = tqdm
            except ImportError:
                pass

    def __enter__(self):
        return self.show if self.tqdm else None

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def show(self, file, done, total):
        if not file:
            return
        if file != self.file:
            self.__exit__()
            self.file = file
            self.bar = self.tqdm(desc=file, unit="B", unit_scale=True)
        self.bar.total = total or None
        self.bar.update(done - self.bar.n)
