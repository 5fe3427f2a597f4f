#!/bin/sh
# One of three Redis servers behind Sentinel: server.sh OWN_HOST:PORT FIRST_MASTER_HOST:PORT
#
# The configuration is written at the first start only: afterwards it is the sentinels' to rewrite, so that a server that
# comes back is what they made of it. docs/configuration.md says why it is as it is.
set -eu
own=$1 master=$2 shipped=$(dirname "$0")
cat "$shipped/users.acl" "$shipped/replication.acl" >users.acl
if [ ! -e redis.conf ]; then
    cat >redis.conf.new <<END
port ${own#*:}
replica-announce-ip ${own%:*}
replica-announce-port ${own#*:}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
min-replicas-to-write 1
min-replicas-max-lag 1
repl-diskless-sync yes
repl-diskless-sync-delay 0
aclfile $PWD/users.acl
masteruser replica
masterauth $REDIS_REPLICA_PASSWORD
END
    if [ "$own" != "$master" ]; then
        echo "replicaof ${master%:*} ${master#*:}" >>redis.conf.new
    fi
    mv redis.conf.new redis.conf
fi
exec redis-server redis.conf
