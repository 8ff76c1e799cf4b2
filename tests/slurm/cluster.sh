#!/usr/bin/env bash
# A real SLURM on this machine, for tests: every node has its own network, hostname, mounts and processes (namespaces).
#   cluster.sh up DIR            from nothing to idle nodes n1 ... n5; then `. DIR/env`
#   cluster.sh start DIR NODE    a node comes (back)
#   cluster.sh crash DIR NODE    a node is gone at once, with all its processes
#   cluster.sh enter DIR NODE COMMAND...    run a command within the node's mounts
#   cluster.sh down DIR          everything that `up` and `start` have started ends, and DIR goes
# Needs root, no systemd. Code 3: SLURM cannot be run here; the reason is on stderr. One cluster at a time: it belongs to
# the process that has called `up`. What such a process has left behind when it was killed, the next `up` clears away.
set -euo pipefail
ACTION=$1 DIR=$2
export PATH=$PATH:/usr/sbin:/sbin
PREFIX=lingslurm NET=10.99.0
OWNER=/run/$PREFIX    # `PID START_TIME DIR` of the cluster that is up
unable() { echo "SLURM cannot be run here: $*" >&2; exit 3; }
# processes are noted as `NAME PID START_TIME`: the start time tells a process from a later one with its number
note() { echo "$1 $2 $(awk '{print $22}' "/proc/$2/stat")" >>"$DIR/run/processes"; }
alive() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    set -- "$2" ${stat##*) }
    [ "$2" != Z ] && [ "${21}" = "$1" ]
}
process_of() { awk -v name="$1" '$1 == name {pid = $2; start = $3} END {print pid, start}' "$DIR/run/processes"; }

install() {
    local missing=() name log
    for name in slurmctld slurmd slurm-client munge iproute2; do
        [ "$(dpkg-query -W -f='${Status}' $name 2>/dev/null)" = "install ok installed" ] || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || unable "no apt-get to install ${missing[*]} with"
    log=$(mktemp)
    # the packages must not start daemons of their own
    [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"; } >"$log" 2>&1 ||
        unable "apt-get: $(tail -n 1 "$log")"
}

configure() {
    local host i
    host=$(hostname -s)
    { # the second form of an address is what torch looks up
        echo "127.0.0.1 localhost"
        for i in $(seq "$NODES"); do printf '%s n%d\n::ffff:%s n%d\n' "$NET.$i" "$i" "$NET.$i" "$i"; done
        echo "$NET.254 $host"
    } >"$DIR/hosts"
    {
        cat <<END
ClusterName=test
SlurmctldHost=$host($NET.254)
# cred_expire: also how long a requeued job waits before it starts again; less than 5 is taken for the default, 120
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
# without cgroups, systemd, MPI and a database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
# nodes may claim more than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=5
# quick, and nothing is forgotten
MinJobAge=100000
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=20
InactiveLimit=0
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
END
        for i in $(seq "$NODES"); do
            echo "NodeName=n$i NodeHostname=n$i NodeAddr=$NET.$i Sockets=1 CoresPerSocket=16 RealMemory=64000 State=UNKNOWN"
        done
        echo "PartitionName=main Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP"
        echo "PartitionName=aside Nodes=n[4-5] MaxTime=INFINITE State=UP"
    } >"$DIR/slurm.conf"
    # client commands run in the controller's network; within a job in the node's
    for name in sbatch srun squeue sinfo scontrol scancel; do
        cat >"$DIR/bin/$name" <<END
#!/bin/sh
[ -n "\${SLURM_JOB_ID:-}" ] && exec /usr/bin/$name "\$@"
SLURM_CONF=$DIR/slurm.conf exec nsenter --net=/run/netns/$PREFIX-ctl /usr/bin/$name "\$@"
END
    done
    # process 1 of a node: when it goes, the kernel ends everything in the node
    cat >"$DIR/bin/node_main" <<END
#!/bin/bash
hostname "\$1"
mount --bind $DIR/hosts /etc/hosts
export SLURM_CONF=$DIR/slurm.conf HOSTNAME=\$1
trap 'kill -TERM \$daemon; wait \$daemon; exit' TERM
slurmd -D -f $DIR/slurm.conf -N "\$1" & daemon=\$!
while :; do wait \$daemon; kill -0 \$daemon 2>/dev/null || { sleep infinity & daemon=\$!; }; done
END
    chmod 755 "$DIR"/bin/*
    echo "export SLURM_CONF=$DIR/slurm.conf PATH=$DIR/bin:\$PATH" >"$DIR/env"
}

start_node() {
    local unshare child=
    mkdir -p "$DIR/spool/$1"
    setsid nsenter --net="/run/netns/$PREFIX-$1" unshare --uts --mount --pid --fork --mount-proc --kill-child \
        "$DIR/bin/node_main" "$1" </dev/null >>"$DIR/log/node.$1.out" 2>&1 &
    unshare=$!
    for _ in $(seq 200); do
        child=$(tr -d ' ' <"/proc/$unshare/task/$unshare/children" 2>/dev/null || true)
        [ -z "$child" ] || break
        sleep 0.05
    done
    [ -n "$child" ] || { cat "$DIR/log/node.$1.out" >&2; exit 1; }
    note "$1" "$child"
}

up() {
    local name i
    NODES=5
    [ "$(id -u)" = 0 ] || unable "not root"
    for name in unshare nsenter setsid; do command -v $name >/dev/null || unable "no $name"; done
    install
    clear_away
    # removed by `down`; the first one wins
    (set -o noclobber; echo "$PPID $(awk '{print $22}' "/proc/$PPID/stat") $DIR" >"$OWNER") 2>/dev/null || unable "no $OWNER"
    ip netns add $PREFIX-ctl 2>/dev/null || { rm "$OWNER"; unable "no network namespaces"; }
    rm -rf "$DIR" && mkdir -p "$DIR"/{state,spool,log,run,bin,key}
    chmod 755 "$DIR"; chmod 700 "$DIR/key" "$DIR/state"
    : >"$DIR/run/processes"
    configure
    (umask 077; head -c 128 /dev/urandom >"$DIR/key/munge.key")
    setsid munged --foreground --key-file="$DIR/key/munge.key" --socket="$DIR/run/munge.socket" \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" \
        </dev/null >"$DIR/log/munged.out" 2>&1 &
    note munged $!
    for _ in $(seq 200); do [ -S "$DIR/run/munge.socket" ] && break; sleep 0.05; done
    [ -S "$DIR/run/munge.socket" ] || { tail -n 3 "$DIR/log/munged.log" >&2; exit 1; }
    for i in $(seq "$NODES"); do ip netns add "$PREFIX-n$i"; ip -n "$PREFIX-n$i" link set lo up; done
    ip -n $PREFIX-ctl link set lo up
    ip -n $PREFIX-ctl link add br0 type bridge
    ip -n $PREFIX-ctl addr add $NET.254/24 dev br0
    ip -n $PREFIX-ctl link set br0 up
    for i in $(seq "$NODES"); do
        ip -n $PREFIX-ctl link add "v$i" type veth peer name eth0 netns "$PREFIX-n$i"
        ip -n $PREFIX-ctl link set "v$i" master br0 up
        ip -n "$PREFIX-n$i" addr add "$NET.$i/24" dev eth0
        ip -n "$PREFIX-n$i" link set eth0 up
    done
    setsid nsenter --net=/run/netns/$PREFIX-ctl slurmctld -D -f "$DIR/slurm.conf" </dev/null >"$DIR/log/slurmctld.out" 2>&1 &
    note slurmctld $!
    for i in $(seq "$NODES"); do start_node "n$i"; done
    . "$DIR/env"
    for _ in $(seq 300); do
        [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c '^idle$')" = "$NODES" ] && return 0
        sleep 0.1
    done
    tail -n 20 "$DIR"/log/* >&2
    exit 1
}

# what a cluster whose owner is gone has left
clear_away() {
    local pid start dir
    [ -e "$OWNER" ] || return 0
    read -r pid start dir <"$OWNER"
    if alive "$pid" "$start"; then unable "another cluster is up, in $dir"; fi
    (DIR=$dir; down)
}

down() {
    local name pid start
    if [ -e "$OWNER" ] && [ "$(awk '{print $3}' "$OWNER")" != "$DIR" ]; then echo "another cluster is up" >&2; return 1; fi
    mkdir -p "$DIR/run"; touch "$DIR/run/processes"
    [ ! -e "$DIR/env" ] || . "$DIR/env"
    timeout 10 scancel --state=PENDING,RUNNING --user=root 2>/dev/null || true
    for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
    for signal in TERM KILL; do
        while read -r name pid start; do alive "$pid" "$start" && kill -$signal "$pid"; done <"$DIR/run/processes" || true
        for _ in $(seq 60); do
            local left=
            while read -r name pid start; do alive "$pid" "$start" && left=yes; done <"$DIR/run/processes" || true
            [ -n "$left" ] || break
            sleep 0.05
        done
    done
    for name in $(ip netns list | awk -v prefix="^$PREFIX-" '$1 ~ prefix {print $1}'); do
        ip netns pids "$name" | xargs -r kill -KILL 2>/dev/null || true    # ours, even where DIR with the list is gone
        ip netns del "$name"
    done
    rm -rf "$DIR" "$OWNER"
}

case $ACTION in
    up) up ;;
    down) down ;;
    start) start_node "$3" ;;
    crash) read -r pid start < <(process_of "$3"); alive "$pid" "$start" && kill -KILL "$pid" ;;
    enter) read -r pid start < <(process_of "$3"); shift 3; exec nsenter --target "$pid" --mount --pid "$@" ;;
    *) sed -n '2,9p' "$0"; exit 2 ;;
esac
