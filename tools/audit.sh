#!/usr/bin/env bash
# Known vulnerabilities of the pinned dependencies: `bash tools/audit.sh PYTHON`. Exit status 1 when there are any;
# where pip-audit or its database cannot be reached within a minute it says so and passes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
report=$(mktemp)
trap 'rm -f "$report"' EXIT
if ! "$python" -m pip install -q -c constraints.txt pip-audit 2>/dev/null; then
  echo "audit skipped: pip-audit cannot be installed"
  exit 0
fi
timeout 60 "$python" -m pip_audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
  --timeout 5 --format json --output "$report" 2>"$report.log"
if [ -s "$report" ]; then
  "$python" - "$report" <<'PYTHON'
import json, sys

packages = json.load(open(sys.argv[1]))["dependencies"]
audited = [p for p in packages if "skip_reason" not in p]  # a mirror without data skips every one of them
found = [f"{p['name']} {p['version']}: {v['id']}" for p in audited for v in p["vulns"]]
if audited:
    print(f"audit: {len(audited)} of {len(packages)} packages, {len(found)} known vulnerabilities", *found, sep="\n  ")
else:
    print(f"audit skipped: the index that was reached knows none of the {len(packages)} packages")
sys.exit(bool(found))
PYTHON
  status=$?
else
  echo "audit skipped: no database of vulnerabilities can be reached ($(tail -n 1 "$report.log" | cut -c 1-120))"
  status=0
fi
rm -f "$report.log"
exit "$status"
