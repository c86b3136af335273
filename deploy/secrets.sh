#!/usr/bin/env bash
# Makes ~/.salt, the secrets of one cluster, on the machine that `ray up` is called on: Ray's token, the authority that signs the certificates of
# its nodes, and an access token of the teacher. `ray up` copies the folder to every node. What is there is kept.
set -euo pipefail
umask 077
mkdir -p ~/.salt
cd ~/.salt
test -e ray-token || openssl rand -hex 32 > ray-token
test -e ca.key || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=salt -keyout ca.key -out ca.crt 2> /dev/null
test -e teacher-token || openssl rand -hex 32 > teacher-token
test -e tokens.yaml || echo "students: {token: $(cat teacher-token)}" > tokens.yaml
