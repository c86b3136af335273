#!/bin/sh
# Ray Serve's HAProxy with its statistics on the loopback alone: Ray has no setting for where they listen.
for argument; do
  case $argument in
  *.cfg) sed -i -E "s/^( *bind )\*?:($RAY_SERVE_HAPROXY_METRICS_PORT|$RAY_SERVE_HAPROXY_STATS_PORT)$/\1127.0.0.1:\2/" "$argument" ;;
  esac
done
exec "$SALT_HAPROXY" "$@"
