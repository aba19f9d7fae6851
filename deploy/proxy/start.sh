#!/bin/sh
# Starts nginx. What differs from place to place is written to /tmp/here.conf first, as nginx reads neither the
# environment nor /etc/resolv.conf: the name server, and SUPERLINK, the SuperLink's HOST:PORT. In Kubernetes the host is
# the whole name (superlink.fedlora.svc.cluster.local), as nginx does not know the search list of resolv.conf.
set -eu
here="${TMPDIR:-/tmp}/here.conf"
server=$(sed -n 's/^nameserver[[:space:]]*//p' /etc/resolv.conf | head -n 1)
case $server in *:*) server="[$server]" ;; esac
cat >"$here" <<END
resolver ${server:-127.0.0.11} valid=5s ipv6=off;
map "" \$superlink { default "${SUPERLINK:-superlink:8000}"; }
END
exec nginx "$@"
