#!/bin/sh
# Ray Serve's HAProxy, with what Ray has no setting for: its statistics listen on the loopback alone, and no line about a
# request leaves for a port of the machine, whoever listens there; the head of a request has a time, and one address no
# more than three quarters of all connections; and a path that nobody behind it knows yet is a service that starts, not
# one that is not there.
starts='{"error":"the teacher is not ready","expected":"a route that the ingress knows","got":"an ingress that starts","hint":"ask again after Retry-After"}'
per_address="stick-table type ipv6 size 100k expire 1m store conn_cur\n    tcp-request connection track-sc0 src,ipmask(32,64)\n    tcp-request connection reject if { sc0_conn_cur gt $((RAY_SERVE_HAPROXY_MAXCONN * 3 / 4)) }"
not_ready="status 503 content-type application/json hdr Retry-After 1 string '$starts'"
for argument; do
  case $argument in
  *.cfg)
    sed -i -E \
      -e "s/^( *bind )\*?:($RAY_SERVE_HAPROXY_METRICS_PORT|$RAY_SERVE_HAPROXY_STATS_PORT)$/\1127.0.0.1:\2/" \
      -e '/^ *log .* local0 info$/d' \
      -e "s|^( *)errorfile 503 .*|\1http-error $not_ready|" \
      -e '/^ *timeout http-request /d' \
      -e "s/^defaults$/&\n    timeout http-request ${SALT_HEADER_TIMEOUT_MS}ms/" \
      -e "s|^frontend http_frontend$|&\n    $per_address\n    http-response return $not_ready if { status 404 } !{ res.hdr(Content-Type) -m beg application/json }|" \
      "$argument"
    grep -q '^ *use_backend ' "$argument" || sed -i "s|^ *http-request return status 404 .*|    http-request return $not_ready|" "$argument"
    ;;
  esac
done
exec "$SALT_HAPROXY" "$@"
