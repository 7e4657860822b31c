"""Ask for known vulnerabilities of the packages in a folder, and say so if nobody could be asked.

    python -m benchmarks.audit PIP_AUDIT FOLDER      as `make audit` does

pip-audit ends with a traceback where its database cannot be reached, and with success where the database knows none of
the packages, as behind a mirror. The exit code is 0 if every package was looked up and none has a known vulnerability,
1 if one has, 3 if packages could not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_OWN = "passdeploy"  # installed for development, and in no database


def main(pip_audit: str, folder: str) -> int:
    """Run pip-audit, print what it found, and return the exit code."""
    done = subprocess.run(
        [pip_audit, "--format", "json", "--path", folder], capture_output=True, text=True, check=False
    )
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (done.stderr.strip() or "it printed nothing").splitlines()[-1][:300]
        print(f"error: the database of vulnerabilities was not reached.\npip-audit says: {reason}", file=sys.stderr)
        return 3
    code, text = verdict([package for package in packages if package["name"] != _OWN])
    print(text, file=sys.stdout if code == 0 else sys.stderr)
    return code


def verdict(packages: list[dict[str, Any]]) -> tuple[int, str]:
    """Return the exit code and what is printed, by the packages of pip-audit's report."""
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    if found:
        return 1, "\n".join(["known vulnerabilities:", *found])
    if unknown:
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        return 3, f"error: {len(unknown)} of {len(packages)} packages could not be looked up: {some}"
    return 0, f"{len(packages)} packages, no known vulnerabilities"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
