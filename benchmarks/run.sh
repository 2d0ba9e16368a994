#!/usr/bin/env bash
# The benchmark: full fine-tuning against LoRA. `bash benchmarks/run.sh --help` lists the options.
# Interrupted, start it again: finished arms are kept.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
  elif [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
  else
    python="$(command -v python || command -v python3)"
  fi
fi
if ! "$python" -c "import xfactor_peft, matplotlib" 2>/dev/null; then
  echo "$python cannot import xfactor_peft and matplotlib; run: pip install -c constraints.txt -e \".[plot]\"" >&2
  exit 1
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m bench.training "$@"
