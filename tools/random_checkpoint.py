"""Make a checkpoint with random weights of any config, without a GPU and without the model in memory.

For trying export, import and storage on large models:

    python tools/random_checkpoint.py CONFIG OUT [a.b=c ...] [--dtype bfloat16] [--tokenizer DIR]
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from pathlib import Path

import torch

from ling.checkpoint.folder import Manifest, copy_tokenizer
from ling.config import UserError, check_config, load_config, to_dict
from ling.config.schema import Config
from ling.hf.checkpoint_writer import write_checkpoint
from ling.hf.names import checkpoint_shapes, keeps_fp32
from ling.hf.tasks import Slab

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_BLOCK = 1 << 22


def random_checkpoint(config: Config, out: Path, dtype: str, tokenizer: Path, workers: int = 2) -> int:
    """Write the checkpoint `out`: matrices normal with the config's std, norms near 1, a small router bias.

    Returns:
        Bytes of its tensors.
    """
    shapes = checkpoint_shapes(config.model)
    tensors = {name: (torch.float32 if keeps_fp32(name) else DTYPES[dtype], shape) for name, shape in shapes.items()}

    def make(slab: Slab) -> torch.Tensor:
        number_format, shape = tensors[slab.key]
        tensor = torch.empty((slab.last - slab.first, *shape[1:]), dtype=number_format)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{config.run.seed}/{slab.key}/{slab.first}".encode()))
        flat = tensor.view(-1)
        std = config.model.init_method_std if len(shape) > 1 else 0.1
        mean = 1.0 if slab.key.endswith("norm.weight") else 0.0
        for first in range(0, flat.numel(), _BLOCK):  # a block of fp32 at a time
            block = flat[first : first + _BLOCK]
            block.copy_(torch.empty(block.numel()).normal_(mean, std, generator=generator))
        return tensor

    manifest = Manifest(
        step=0, consumed_samples=0, config=to_dict(config), world_size=1, versions={"torch": torch.__version__}
    )
    write_checkpoint(
        out,
        tensors,
        make,
        manifest,
        lambda folder: copy_tokenizer(tokenizer, folder.parent),
        workers=workers,
        what="random weights",
    )
    return sum(torch.Size(shape).numel() * number_format.itemsize for number_format, shape in tensors.values())


def main() -> int:
    """Make one from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write; must not exist")
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings in place of the file's")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="number format (default bfloat16)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer to put in (default: the config's)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads (default 2)")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        config = load_config(args.config, args.overrides)
        check_config(config)
        tokenizer = args.tokenizer or Path(config.data.tokenizer)
        size = random_checkpoint(config, args.out, args.dtype, tokenizer, args.workers)
    except UserError as error:
        print(f"random_checkpoint: error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    print(f"{args.out}: {size / 1e9:.2f} GB in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
