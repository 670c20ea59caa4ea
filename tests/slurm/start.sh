#!/usr/bin/env bash
# Start a real, throw-away SLURM cluster on this machine: controller, accounting, a CPU node c1, and nodes g1 and g2 with two fake
# GPUs each.
#
#   start.sh DIR           settings, keys, database, logs and process ids go below DIR; stop.sh DIR stops it all
#   start.sh DIR NODE      start one node's daemon again, and wait until all nodes are up
#
# Needs root and a Debian or Ubuntu machine: missing packages are installed, no service of theirs is started. All daemons listen on
# 127.0.0.1, ports 16817 to 16829. Nodes have more CPUs and memory than the machine; a job over its memory is killed all the same.
set -euo pipefail
dir=$(realpath -m "${1:?usage: start.sh DIR [NODE]}")
nodes=(c1 g1 g2)
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

say() { echo "slurm: $*" >&2; }
die() { say "FAILED: $*"; exit 1; }
[ "$(id -u)" = 0 ] || die "must run as root, since SLURM's daemons start jobs"

# ---- packages
packages=(munge slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin mariadb-server-core mariadb-client-core)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done
install_packages() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}" >&2; }
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    policy=/usr/sbin/policy-rc.d # a policy of 101 keeps the packages from starting their services
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    install_packages || { apt-get update >&2 && install_packages; } || die "can't install ${missing[*]}"
fi

# ---- processes: DIR/run/NAME.pid holds the process id and its start time, so that no other process is ever taken for it
started() { awk '{sub(/^.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null; }
launch() {
    local name=$1 pid=0 start=none
    shift
    if [ -e "$dir/run/$name.pid" ]; then read -r pid start <"$dir/run/$name.pid"; fi
    if [ "$(started "$pid")" = "$start" ]; then return; fi # it runs
    setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
    echo "$! $(started $!)" >"$dir/run/$name.pid"
}
wait_for() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until timeout 5 "$@" </dev/null >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || die "$what did not come up: see $dir/log"
        sleep 0.2
    done
}
launch_node() { launch "slurmd-$1" slurmd -D -N "$1" -f "$dir/etc/slurm.conf"; }
wait_for_nodes() {
    local up=0
    for ((n = 0; n < 600; n++)); do
        up=$(sinfo -h -N -o '%N %t' | grep -Ec ' (idle|mix|alloc|comp)$') || true
        if [ "$up" = ${#nodes[@]} ]; then return; fi
        sleep 0.2
    done
    die "not all nodes came up: see $dir/log"
}
if [ $# = 2 ]; then
    launch_node "$2"
    wait_for_nodes
    exit
fi

# ---- settings
umask 022
mkdir -p "$dir"/{etc,run,log,munge,state,dev,db,spool}
chmod 700 "$dir/db"
chmod 711 "$dir/munge" # munged insists on x for all: clients must reach its socket
socket=$dir/munge/socket
host=$(hostname -s)
[ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
[ -s "$dir/etc/password" ] || (umask 077 && od -An -N12 -tx1 /dev/urandom | tr -d ' \n' >"$dir/etc/password")
cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/state/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/spool/%n/slurmd.pid
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmdSpoolDir=$dir/spool/%n
# Neither cgroups nor systemd are needed; memory is watched every 2 seconds.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
SwitchType=switch/none
# Several nodes on one machine, of sizes that it doesn't have.
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
# A busy machine is no dead node: only a test says that a node is down, and messages may take a minute.
SlurmdTimeout=0
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=300
# A job over its time is killed at most 5 seconds after SIGTERM.
KillWait=5
CompleteWait=0
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
NodeName=c1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16827 CPUs=4 RealMemory=64000 State=UNKNOWN
NodeName=g1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16828 CPUs=4 RealMemory=64000 Gres=gpu:fake:2 State=UNKNOWN
NodeName=g2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16829 CPUs=4 RealMemory=64000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=main Nodes=c1,g1,g2 Default=YES DefaultTime=10 MaxTime=1-0 State=UP
CONF
{
    echo AutoDetect=off
    for node in g1 g2; do echo "NodeName=$node Name=gpu Type=fake File=$dir/dev/nvidia[0-1]"; done
} >"$dir/etc/gres.conf"
for number in 0 1; do # devices that are never opened, of /dev/null's number; the digit becomes CUDA_VISIBLE_DEVICES
    [ -c "$dir/dev/nvidia$number" ] || mknod -m 666 "$dir/dev/nvidia$number" c 1 3 || die "mknod in $dir/dev"
done
echo CgroupPlugin=cgroup/v1 >"$dir/etc/cgroup.conf"
(umask 077 && cat >"$dir/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/state/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16820
StorageUser=slurm
StoragePass=$(cat "$dir/etc/password")
StorageLoc=slurm
CONF
)
# Jobs lose SLURM_CONF on their way, so the settings have to be where SLURM looks by itself.
if [ -e /etc/slurm/slurm.conf ] && [ "$(readlink /etc/slurm/slurm.conf)" != "$dir/etc/slurm.conf" ]; then
    die "/etc/slurm/slurm.conf exists: this machine has a SLURM cluster already"
fi
mkdir -p /etc/slurm
ln -sfn "$dir/etc/slurm.conf" /etc/slurm/slurm.conf
export SLURM_CONF=$dir/etc/slurm.conf

# ---- authentication, accounting, controller, nodes
launch munged munged --foreground --force --key-file="$dir/munge/key" --socket="$socket" --log-file="$dir/log/munged.log" \
    --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --num-threads=2
wait_for 120 munged munge -n -S "$socket"

sql() { mariadb --no-defaults -uroot -S "$dir/db/socket" -e "$1"; }
if [ ! -d "$dir/db/mysql" ]; then
    mariadb-install-db --no-defaults --user=root --datadir="$dir/db" --auth-root-authentication-method=normal --skip-test-db \
        >"$dir/log/mariadb-install.out" 2>&1 || die "mariadb-install-db: see $dir/log"
fi
launch mariadbd mariadbd --no-defaults --user=root --datadir="$dir/db" --socket="$dir/db/socket" --bind-address=127.0.0.1 \
    --port=16820 --pid-file="$dir/db/pid" --skip-name-resolve --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
    --innodb-flush-log-at-trx-commit=2 --performance-schema=OFF --skip-log-bin
for ((n = 0; n < 600; n++)); do
    if sql 'select 1' >/dev/null 2>&1; then break; fi
    sleep 0.2
done
sql "create database if not exists slurm;
     create user if not exists 'slurm'@'127.0.0.1' identified by '$(cat "$dir/etc/password")';
     grant all on slurm.* to 'slurm'@'127.0.0.1';" || die "mariadbd did not come up: see $dir/log"
launch slurmdbd slurmdbd -D
wait_for 120 slurmdbd sacctmgr -n -i list cluster
if ! sacctmgr -n list cluster format=cluster | grep -qw test; then
    sacctmgr -i add cluster test >/dev/null
    sacctmgr -i add account test cluster=test description=test organization=test >/dev/null
    sacctmgr -i add user root account=test cluster=test >/dev/null
fi

launch slurmctld slurmctld -D -f "$SLURM_CONF"
wait_for 120 slurmctld scontrol ping
for node in "${nodes[@]}"; do
    mkdir -p "$dir/spool/$node"
    launch_node "$node"
done
wait_for_nodes
sinfo -N -o '%N %P %t %c %m %G' >&2
