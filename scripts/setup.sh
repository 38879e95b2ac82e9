#!/usr/bin/env bash
# Makes the environment that the other scripts run in, from constraints.txt, and does nothing where it is already there.
#
#   bash scripts/setup.sh        # make it, or bring it up to date
#   source scripts/setup.sh      # in a script: the same, and `$python` is its interpreter afterwards
#
# MINILLM_PYTHON names an interpreter that has minillm already, as in a container: then nothing is made.
# MINILLM_VENV names another place than .venv (a relative one counts from the checkout). An environment that this script made and that an interruption left
# half-made is thrown away and made again; one that was there before is installed into and never removed.
set -euo pipefail

# Told by a Python that has torch and minillm, of which neither is imported: that takes seconds.
setup_both='import importlib.util as u; print("both" if u.find_spec("torch") and u.find_spec("minillm") else "no")'

setup_fail() {
  printf 'setup: %s\n' "$@" >&2
  exit 2
}

setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup_venv=${MINILLM_VENV:-$setup_root/.venv}
[[ $setup_venv == /* ]] || setup_venv=$setup_root/$setup_venv
setup_state=$setup_venv/.minillm-state  # "building", or who made the environment ("ours", "theirs") and from what
python=$setup_venv/bin/python

# Exit status 0 where "$1" runs and is a Python that the lock is made for.
setup_python_fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

# Prints the first suitable Python that can also make environments.
setup_find_python() {
  local name without=
  for name in python3.11 python3.12 python3 python; do
    setup_python_fits "$name" || continue
    if "$name" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
    without=${without:-$name}
  done
  [[ -z $without ]] || setup_fail "$without is there, but its venv module is not." \
    "Install it (on Debian and Ubuntu: apt-get install $without-venv) and run this again."
  setup_fail "no Python 3.11 or 3.12 on the PATH (looked for python3.11, python3.12, python3, python)." \
    "Install one of them and run this again."
}

# Prints a digest of everything that the environment is made from; the root is in it because the install is editable.
setup_digest() {
  { printf '%s\n' "$setup_root" && cat "$setup_root"/{constraints.txt,setup.cfg,pyproject.toml}; } |
    { sha256sum 2>/dev/null || shasum -a 256; } | cut -d ' ' -f 1
}

setup_pip() {
  local log=$setup_venv/install.log
  DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$python" -m pip install "$@" >>"$log" 2>&1 && return
  tail -n 15 "$log" >&2
  setup_fail "pip install failed; its last lines stand above, all of them in $log." "Mend the cause and run this again."
}

# Leaves a working Python in $setup_venv, and in the state file who made it.
setup_make_venv() {
  local base owner=$1
  if [[ $owner == theirs ]]; then
    printf 'setup: %s was there before: installing the lock into it\n' "$setup_venv"
    setup_python_fits "$python" || setup_fail "$setup_venv has no working Python 3.11 or 3.12." \
      "Name another place in MINILLM_VENV, or remove that folder, and run this again."
    return
  fi
  base=$(setup_find_python)
  printf 'setup: making %s with %s and installing the lock (a few minutes the first time)\n' \
    "$setup_venv" "$("$base" --version)"
  rm -rf "$setup_venv"
  mkdir -p "$setup_venv"
  echo building >"$setup_state"
  "$base" -m venv "$setup_venv" || setup_fail "$base could not make an environment in $setup_venv (see above)."
}

# Exit status 0 where the environment was made from the lock, the metadata and the checkout as they are now.
setup_is_current() {
  [[ $(cat "$setup_state" 2>/dev/null) =~ ^(ours|theirs)\ $1$ ]] && setup_python_fits "$python"
}

setup_install() {
  local state owner=ours digest=$1 torch began=$SECONDS
  state=$(cat "$setup_state" 2>/dev/null || true)
  if [[ -z $state && -n $(ls -A "$setup_venv" 2>/dev/null) ]]; then
    [[ -f $setup_venv/pyvenv.cfg ]] || setup_fail "$setup_venv holds files and is no Python environment; left as it is." \
      "Name another place in MINILLM_VENV and run this again."
    owner=theirs
  fi
  [[ $state != "theirs "* ]] || owner=theirs

  if [[ $state == "ours "* ]] && setup_python_fits "$python"; then
    printf 'setup: the lock, the metadata or the checkout changed: bringing %s up to date\n' "$setup_venv"
    echo building >"$setup_state"
  else
    setup_make_venv "$owner"
  fi
  torch=$(grep -E '^torch==' "$setup_root/constraints.txt") || setup_fail "constraints.txt has no line torch==VERSION."
  : >"$setup_venv/install.log"
  # torch first and alone: by far the largest, so that a failure further on does not cost its download again.
  setup_pip -c "$setup_root/constraints.txt" "$torch"
  setup_pip -c "$setup_root/constraints.txt" -e "$setup_root[dev]"
  echo "$owner $digest" >"$setup_state.new"
  mv "$setup_state.new" "$setup_state"
  printf 'setup: done in %d s\n' "$((SECONDS - began))"
}

setup_main() {
  local digest
  if [[ -n ${MINILLM_PYTHON:-} ]]; then
    python=$(command -v "$MINILLM_PYTHON") || setup_fail "MINILLM_PYTHON=$MINILLM_PYTHON: no such program." \
      "Name an interpreter that has minillm, or unset it and run this again."
    [[ $("$python" -c "$setup_both" 2>/dev/null) == both ]] ||
      setup_fail "MINILLM_PYTHON=$MINILLM_PYTHON: it is no Python that has torch and minillm." \
        "Install them into it (README, Install), or unset it: an environment is made then."
    return
  fi
  digest=$(setup_digest)
  setup_is_current "$digest" && return
  # Two scripts started together must not both install: the second waits, and then finds the work done.
  if command -v flock >/dev/null 2>&1; then
    mkdir -p "$(dirname "$setup_venv")"
    exec 9>"$setup_venv.lock"
    flock 9
  fi
  setup_is_current "$digest" || setup_install "$digest"
  exec 9>&-
}

setup_main
