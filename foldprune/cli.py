"""The command line: ``foldprune compress|decompress|inspect|verify|demo|reproduce``.

Results go to standard output; progress, warnings and errors to standard error. Exit codes: 0 fine,
1 the verification failed, 2 wrong usage or an error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import FoldpruneWarning
from .version import version

if TYPE_CHECKING:
    from .compressed import Compressed
    from .recipe import Recipe

__all__ = ["main"]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_PRESETS = ("lossless", "paper")
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; wrong usage is argparse's SystemExit(2)."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", FoldpruneWarning)
            warnings.showwarning = _show_warning
            code = run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (OSError, ValueError, TypeError, KeyError, ImportError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"foldprune: error: {text}", file=sys.stderr)
        return 2


# ---- commands -----------------------------------------------------------------------------------


def _compress(args: argparse.Namespace) -> int:
    from .api import compress
    from .calibration import Calibration

    _check_destination(args.source, args.destination, folder=args.max_shard_bytes is not None)
    compressed = compress(
        args.source,
        **_how(args),
        config=args.config,
        num_heads=args.num_heads,
        calibration=Calibration.load(args.calibration) if args.calibration else None,
        progress=sys.stderr.isatty() and not args.quiet,
        threads=args.threads,
    )
    compressed.save(args.destination, max_shard_bytes=args.max_shard_bytes)
    if args.json:
        _print_json(_summary(args.destination, compressed))
    elif not args.quiet:
        print(compressed.report)
    return 0


def _decompress(args: argparse.Namespace) -> int:
    from .container import load

    path = args.destination
    if not path.endswith((".safetensors", *_TORCH_SUFFIXES)):
        known = ", ".join(_TORCH_SUFFIXES)
        raise ValueError(f"{path}: the name must end in .safetensors, or for torch in {known}")
    _check_destination(args.source, path, folder=False)
    compressed = load(args.source, threads=args.threads)
    _write_dense(compressed, path)
    if args.json:
        _print_json({"file": path, "tensors": len(compressed), "bytes": os.path.getsize(path)})
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from .container import load

    compressed = load(args.file)
    if args.json:
        _print_json(_summary(args.file, compressed))
    else:
        print(f"recipe {compressed.recipe.to_json()}")
        print(compressed.report.table() if args.tensors else compressed.report)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .container import load
    from .verify import verify

    verification = verify(args.original, load(args.compressed))
    if args.json:
        _print_json(verification.to_dict())
    else:
        print(verification)
    return 0 if verification else 1


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    how = _how(args)
    variants = {args.recipe or f"rate {args.rate:g}": how} if how else demo.VARIANTS
    outcomes = demo.run(variants, progress=sys.stderr.isatty())
    if args.json:
        _print_json(
            {"model": demo.PACKAGE, "outcomes": [outcome.to_dict() for outcome in outcomes]}
        )
    else:
        print(demo.describe(outcomes))
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from .eval.reproduce import reproduce

    made = reproduce(
        args.table,
        out=args.out or f"foldprune-{args.table}",
        quick=args.quick,
        models=args.models,
        sets=args.sets,
        methods=args.methods,
        rates=args.rates,
        seeds=args.seeds,
        progress=sys.stderr.isatty(),
        threads=args.threads,
    )
    if args.json:
        _print_json(made.to_dict())
    else:
        print(made)
    return 0


# ---- what they share ----------------------------------------------------------------------------


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """The rate or recipe that was given, as keyword arguments of ``compress``."""
    if args.recipe is not None:
        return {"recipe": _read_recipe(args.recipe)}
    return {} if args.rate is None else {"rate": args.rate}


def _read_recipe(text: str) -> Recipe:
    from .recipe import Recipe

    if text in _PRESETS:
        preset: Recipe = getattr(Recipe, text)()
        return preset
    try:
        with open(text, encoding="utf-8") as file:
            return Recipe.from_json(file.read())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text}: {error}") from None
    except FileNotFoundError:
        known = ", ".join(_PRESETS)
        raise FileNotFoundError(f"recipe {text}: neither one of {known} nor a file") from None


def _check_destination(source: str, destination: str, *, folder: bool) -> None:
    """Refuses before the work what could not be written after it, or would replace the input."""
    if os.path.exists(destination) and os.path.samefile(source, destination):
        raise ValueError(
            f"{destination}: the result would replace its source; give it another name"
        )
    if not folder and os.path.isdir(destination):
        raise IsADirectoryError(f"{destination} is a folder; give the name of a file")
    parent = os.path.dirname(os.path.abspath(destination))
    if not folder and not os.path.isdir(parent):
        raise FileNotFoundError(f"{parent}: no such folder")


def _write_dense(compressed: Compressed, path: str) -> None:
    """The dense state dict, atomically. Tied names stay one tensor in a torch file; safetensors has
    no ties, so there each of them is written out, and the file loads strictly all the same."""
    from .container import write_atomically

    if path.endswith(_TORCH_SUFFIXES):
        try:
            import torch
        except ImportError:
            raise ImportError(
                f"writing {path} needs PyTorch: pip install 'foldprune[torch]'"
            ) from None
        tensors = compressed.state_dict("torch")
        write_atomically(path, lambda temporary: torch.save(tensors, temporary))
    else:
        import numpy as np
        from safetensors.numpy import save_file

        arrays = {
            name: np.asarray(a, order="C") for name, a in compressed.state_dict("numpy").items()
        }
        write_atomically(path, lambda temporary: save_file(arrays, temporary, {"format": "pt"}))


def _summary(path: str, compressed: Compressed) -> dict[str, Any]:
    return {"file": path, "recipe": compressed.recipe.to_dict(), **compressed.report.to_dict()}


def _print_json(values: dict[str, Any]) -> None:
    """One line; what JSON has no number for (an infinite error) is null."""
    text = json.dumps(values)
    print(json.dumps(json.loads(text, parse_constant=lambda constant: None)))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"foldprune: warning: {message}", file=sys.stderr)


# ---- arguments ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "foldprune",
        description="Smaller transformer checkpoints by pruning and by folding attention.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--json", action="store_true", help="print one JSON object")
        added.set_defaults(run=run)
        return added

    compress = command("compress", _compress, "compress a dense checkpoint")
    compress.add_argument(
        "source",
        metavar="SRC",
        help=".safetensors, a sharded index, a model folder, or a torch .pt/.bin file",
    )
    compress.add_argument(
        "destination", metavar="DST", help="the compressed file (or folder of shards)"
    )
    _add_how(compress)
    compress.add_argument("--quiet", action="store_true", help="no progress and no report")
    compress.add_argument(
        "--config", metavar="PATH", help="the model's config.json (default: the one beside SRC)"
    )
    compress.add_argument(
        "--calibration",
        metavar="FILE",
        help="statistics to fit to, as Calibration.save writes them",
    )
    compress.add_argument(
        "--num-heads", type=int, metavar="N", help="query heads, where there is no configuration"
    )
    _add_threads(compress)
    compress.add_argument(
        "--max-shard-bytes",
        type=int,
        metavar="N",
        help="make DST a folder of shards of at most N bytes",
    )

    decompress = command(
        "decompress", _decompress, "write a compressed checkpoint's dense state dict"
    )
    decompress.add_argument(
        "source", metavar="SRC", help="a compressed file, folder of shards or index"
    )
    decompress.add_argument(
        "destination",
        metavar="DST",
        help="a .safetensors file, or .pt/.pth/.bin for torch.save, which keeps tied tensors tied",
    )
    _add_threads(decompress)

    inspect = command("inspect", _inspect, "check a compressed file and print what it holds")
    inspect.add_argument(
        "file", metavar="FILE", help="a compressed file, folder of shards or index"
    )
    inspect.add_argument("--tensors", action="store_true", help="list every tensor too")

    verify = command(
        "verify", _verify, "compare with the original; exit 1 if something promised lossless is not"
    )
    verify.add_argument("original", metavar="ORIGINAL", help="the dense checkpoint")
    verify.add_argument("compressed", metavar="COMPRESSED", help="what compress made of it")

    demo = command(
        "demo",
        _demo,
        "compress a real sentence encoder and compare its embeddings with the original's",
    )
    _add_how(demo)
    _add_reproduce(command("reproduce", _reproduce, "make the tables that compare methods"))
    return parser


def _add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", choices=("classification", "lm"), required=True)
    parser.add_argument(
        "--quick", action="store_true", help="two sets, one seed and a few steps, to try it"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="log, tables and plots; what is logged there is not made again (default: "
        "foldprune-TABLE)",
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="a name or a model folder")
    parser.add_argument(
        "--sets", nargs="+", metavar="SET", help="a name, hf:owner/name, or a file with texts"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="of original (lm), dense, foldprune, random, magnitude, wanda, sparsegpt (all)",
    )
    parser.add_argument(
        "--rates", nargs="+", type=_rate, metavar="R", help='shares to remove, or "paper"'
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N")
    _add_threads(parser)


def _rate(text: str) -> float | str:
    return text if text == "paper" else float(text)


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--rate", type=float, metavar="R", help="share of all numbers to remove, in [0, 1)"
    )
    group.add_argument(
        "--recipe",
        metavar="RECIPE",
        help=f"{', '.join(_PRESETS)}, or a JSON file of a recipe's fields",
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: all processors)"
    )
