#!/bin/sh
# One of three sentinels: sentinel.sh OWN_HOST:PORT FIRST_MASTER_HOST:PORT
#
# What it has learned since its first start is in its configuration, which it rewrites itself.
set -eu
own=$1 master=$2
if [ ! -e sentinel.conf ]; then
    cat >sentinel.conf.new <<END
port ${own#*:}
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip ${own%:*}
sentinel announce-port ${own#*:}
sentinel monitor plimsoll ${master%:*} ${master#*:} 2
sentinel auth-user plimsoll sentinel
sentinel auth-pass plimsoll $REDIS_SENTINEL_PASSWORD
sentinel down-after-milliseconds plimsoll 1000
sentinel failover-timeout plimsoll 1000
sentinel parallel-syncs plimsoll 2
END
    mv sentinel.conf.new sentinel.conf
fi
exec redis-sentinel sentinel.conf
