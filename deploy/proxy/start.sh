#!/bin/sh
# Starts nginx. What differs from place to place is written to /tmp/here.conf first, as nginx reads neither the
# environment nor /etc/resolv.conf: the name server, whether clients need certificates, and SUPERLINK, the SuperLink's HOST:PORT. In Kubernetes the host is
# the whole name (superlink.fedlora.svc.cluster.local), as nginx does not know the search list of resolv.conf.
set -eu
here="${TMPDIR:-/tmp}/here.conf"
server=$(sed -n 's/^nameserver[[:space:]]*//p' /etc/resolv.conf | head -n 1)
case $server in *:*) server="[$server]" ;; esac
credentials=${CREDENTIALS:-/credentials} certificates=off
[ ! -e "$credentials/client-ca.crt" ] || certificates=optional  # nginx.conf refuses what has none
cat >"$here" <<END
resolver ${server:-127.0.0.11} valid=5s ipv6=off;
ssl_client_certificate $credentials/ca.crt;
ssl_verify_client $certificates;
map "" \$certificates { default $certificates; }
map "" \$superlink { default "${SUPERLINK:-superlink:8000}"; }
END
exec nginx "$@"
