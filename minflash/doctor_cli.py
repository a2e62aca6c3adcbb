"""``minflash doctor``: prints the findings; exit code 1 when something is broken."""

from __future__ import annotations

import argparse
import dataclasses
import json

EPILOG = """ok: as it should be. warn: something is limited, and minflash works all the same.
fail: something is broken; the exit code is 1 then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``minflash doctor``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints all findings."""
    from .doctor import FAIL, examine

    findings = examine()
    broken = any(finding.status == FAIL for finding in findings)
    if args.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": not broken, "checks": checks}, ensure_ascii=False))
        return int(broken)
    for finding in findings:
        print(f"{finding.status:4}  {finding.name:13}  {finding.detail}")
        if finding.advice:
            print(f"{'':21}-> {finding.advice}")
    return int(broken)
