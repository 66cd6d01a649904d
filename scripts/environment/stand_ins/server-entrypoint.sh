#!/bin/sh
# The configuration that the published image makes from the same variables, for PostgreSQL.
set -eu
address="$(getent hosts "$(hostname)" | awk '{print $1; exit}')"
datastore() {
    cat <<END
    $1:
      sql:
        pluginName: "$DB"
        databaseName: "$2"
        connectAddr: "$POSTGRES_SEEDS:$DB_PORT"
        connectProtocol: "tcp"
        user: "$POSTGRES_USER"
        password: "$POSTGRES_PWD"
        maxConns: 20
        maxIdleConns: 20
        maxConnLifetime: "1h"
END
}
role() {
    cat <<END
  $1:
    rpc: {grpcPort: $2, membershipPort: $3, bindOnIP: "$BIND_ON_IP"${4:-}}
END
}
{
    cat <<END
log: {stdout: true, level: info}
persistence:
  numHistoryShards: 4
  defaultStore: default
  visibilityStore: visibility
  datastores:
END
    datastore default temporal
    datastore visibility temporal_visibility
    cat <<END
global:
  membership: {maxJoinDuration: 30s, broadcastAddress: "$address"}
services:
END
    role frontend 7233 6933 ", httpPort: 7243"
    role matching 7235 6935
    role history 7234 6934
    role worker 7239 6939
    cat <<END
clusterMetadata:
  enableGlobalNamespace: false
  failoverVersionIncrement: 10
  masterClusterName: active
  currentClusterName: active
  clusterInformation:
    active: {enabled: true, initialFailoverVersion: 1, rpcName: frontend, rpcAddress: "127.0.0.1:7233"}
dcRedirectionPolicy: {policy: noop}
publicClient: {hostPort: "$address:7233"}
dynamicConfigClient: {filepath: "$DYNAMIC_CONFIG_FILE_PATH", pollInterval: 60s}
END
} >/etc/temporal/config/docker.yaml
exec temporal-server --root /etc/temporal --env docker start
