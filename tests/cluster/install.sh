#!/bin/sh
# In place of a download: this checkout's wheel into a host's venv, beside the packages the tests run with.
# usage: install.sh VENV WHEELS PYTHON
set -eu
venv=$1 wheels=$2 python=$3
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$wheels" 'paceline==0.1.0'
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tests.pth"
for name in ray serve; do
  sed "1s|.*|#!$venv/bin/python|" "$(dirname "$python")/$name" > "$venv/bin/$name"
  chmod +x "$venv/bin/$name"
done
