"""``minflash list``: the models that are here, in minflash's own cache and in huggingface_hub's."""

from __future__ import annotations

import argparse
import json

from .cache import CachedModel, cache_dir, cached_models

EPILOG = """Each name that is not marked can be given to -m:
  minflash run -m NAME "Why is the sky blue?"

A model of the Hugging Face cache (HF_HUB_CACHE, HF_HOME) is converted at its first use.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash list``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each model; nothing is loaded or fetched."""
    from .hub_cache import hub_dir, hub_models

    models = [*cached_models(), *hub_models()]
    if args.json:
        print(json.dumps([_facts(model) for model in models], ensure_ascii=False))
    elif not models:
        print(
            f"no models in {cache_dir()} or {hub_dir()} yet; minflash run fetches the default one"
        )
    else:
        width = max(len(model.name) for model in models)
        for model in models:
            print(_line(model, width))
    return 0


def _facts(model: CachedModel) -> dict[str, object]:
    return {
        "name": model.name,
        "path": str(model.path),
        "bytes": model.nbytes,
        "types": list(model.types),
        "cache": model.cache,
        "supported": model.supported,
    }


def _line(model: CachedModel, width: int) -> str:
    size, types = f"{model.nbytes / 1e6:8.1f} MB", ", ".join(model.types)
    unusable = "" if model.supported else "  (not supported by minflash)"
    return f"{model.name:{width}}  {size}  {types:12}  {model.cache:11}  {model.path}{unusable}"
