#!/usr/bin/env python3
"""Convert a model to the weight file of minflash; the same program as ``minflash convert``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minflash import convert_cli
from minflash.errors import MinflashError


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/convert.py")
    convert_cli.add_arguments(parser)
    try:
        return convert_cli.run(parser.parse_args())
    except MinflashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
