#!/usr/bin/env bash
# Makes a machine a node of a cluster: the project's environment from constraints.txt, a certificate of its own for Ray's TLS, and the variables
# that Ray reads, in every login shell. Needs Python 3.11 or newer, openssl, and ~/.salt as deploy/secrets.sh makes it. Repeat it at will.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! test -x .venv/bin/ray; then
  python3 -m venv .venv
  .venv/bin/pip install --quiet -c constraints.txt -e ".[serve,train]"
fi

umask 077
names="DNS:localhost,IP:127.0.0.1"
for address in $(hostname -I); do names="$names,IP:$address"; done
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$(hostname)" -keyout ~/.salt/node.key -out ~/.salt/node.csr 2> /dev/null
openssl x509 -req -in ~/.salt/node.csr -CA ~/.salt/ca.crt -CAkey ~/.salt/ca.key -set_serial "0x$(openssl rand -hex 16)" -days 3650 \
  -extfile <(echo "subjectAltName=$names") -out ~/.salt/node.crt 2> /dev/null

cat > ~/.salt/environment <<END
export PATH="$PWD/.venv/bin:\$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.salt/ray-token"
export RAY_USE_TLS=1 RAY_TLS_SERVER_CERT="$HOME/.salt/node.crt" RAY_TLS_SERVER_KEY="$HOME/.salt/node.key" RAY_TLS_CA_CERT="$HOME/.salt/ca.crt"
export RAY_USAGE_STATS_ENABLED=0
END
grep -qs "salt/environment" ~/.bashrc || echo ". ~/.salt/environment" >> ~/.bashrc
