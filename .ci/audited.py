"""Says in one line what pip-audit has found; fails if it has found a hole, not if it could not look."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def verdict(report: str, errors: str) -> tuple[str, bool]:
    """Return the line, and whether there is a hole."""
    try:
        found = json.loads(report)["dependencies"]
    except (ValueError, KeyError):
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        return f"NOT AUDITED: {last}", False
    holes = [
        f"{one['name']} {one['version']}: {hole['id']} (fixed in {', '.join(hole['fix_versions']) or 'no version'})"
        for one in found
        for hole in one.get("vulns", ())
    ]
    skipped = sum("skip_reason" in one for one in found)
    if holes:
        return f"{len(holes)} known holes: {'; '.join(holes)}", True
    if skipped:
        return f"NOT AUDITED: {skipped} of {len(found)}, of which PyPI's advisories cannot be reached here", False
    return f"no known hole in {len(found)} packages", False


if __name__ == "__main__":
    line, is_hole = verdict(*(Path(name).read_text() for name in sys.argv[1:]))
    print(line)
    raise SystemExit(is_hole)
