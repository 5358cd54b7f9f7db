#!/usr/bin/env bash
# A real one-node Slurm on this machine, for the tests of the cluster profile.
# Needs root and Debian's packages. Safe to repeat; leaves alone a Slurm that it did not set up.
# The configuration has to be at /etc/slurm: Snakemake's Slurm executor drops SLURM_CONF.
set -euo pipefail

# The daemons lie in folders that the search path of a shell without login may lack.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
readonly CONF=/etc/slurm/slurm.conf
readonly RESERVED_MB=512 # left to the system: a node that offers all its memory may be drained later
readonly STATE=/var/lib/slurm-test
readonly MARK="# Written by circuitflow's .ci/slurm.sh"

answers() { timeout 10 sinfo --noheader --format=%T 2>/dev/null | grep -qE '^(idle|mixed|allocated)'; }

# Zombies do not count: in a container nobody may be there to reap them.
running() { pgrep --runstates D,R,S -x "$1" >/dev/null; }

install_packages() {
  if command -v slurmctld && command -v slurmd && command -v munged; then return; fi >/dev/null
  apt-get update -qq
  # The packages try to start their services, which fails without a configuration: that is expected.
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

configuration() {
  local host cores memory
  host=$(hostname -s)
  cores=$(slurmd -C | sed -n 's/.* CPUs=\([0-9]*\).*/\1/p')
  memory=$(slurmd -C | sed -n 's/.* RealMemory=\([0-9]*\).*/\1/p')
  cat <<CONFIGURATION
$MARK
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$STATE/controller
SlurmdSpoolDir=$STATE/node
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=1
MinJobAge=600
ReturnToService=2
# A job that fits no node is refused at once; by default it would wait for ever.
EnforcePartLimits=ALL
# A pretended GPU: jobs that ask for gpu=1 can be scheduled on a machine without one.
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$((memory - RESERVED_MB)) Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONFIGURATION
}

# Rewrites a configuration of ours that no longer fits this machine, which takes a restart of the daemons.
install_configuration() {
  if [ -f "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
    echo "$CONF belongs to another Slurm, which does not answer; it is left alone." >&2
    exit 1
  fi
  mkdir -p "$(dirname "$CONF")"
  configuration >"$CONF.new" # aside first: one that cannot be written in whole must not take the place of one that can
  if ! cmp -s "$CONF.new" "$CONF"; then
    if scontrol shutdown >/dev/null 2>&1; then
      while running slurmctld || running slurmd; do sleep 0.2; done
    fi
    mv "$CONF.new" "$CONF"
    echo "NodeName=$(hostname -s) Name=gpu Count=1 File=/dev/null" >"$(dirname "$CONF")/gres.conf"
  fi
  rm -f "$CONF.new"
}

start_daemons() {
  mkdir -p "$STATE/controller" "$STATE/node"
  install -d -o munge -g munge -m 0755 /run/munge
  if [ ! -s /etc/munge/munge.key ]; then
    dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
    chown munge:munge /etc/munge/munge.key
    chmod 0400 /etc/munge/munge.key
  fi
  munge -n >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged --force
  running slurmctld || slurmctld
  running slurmd || slurmd
}

wait_until_idle() {
  local second
  for second in $(seq 60); do
    if answers; then return; fi
    if ((second % 10 == 0)); then scontrol update "NodeName=$(hostname -s)" State=RESUME 2>/dev/null || true; fi
    sleep 1
  done
  echo "Slurm did not come up within a minute; the end of its logs:" >&2
  tail -n 20 "$STATE"/*.log >&2 || true
  return 1
}

if ! answers || grep -qsF "$MARK" "$CONF"; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "Setting up Slurm needs root." >&2
    exit 1
  fi
  install_packages
  install_configuration
  start_daemons
  wait_until_idle
fi
sinfo --noheader --Node --format='Slurm is up: node %N, %c CPUs, %m MB, %G, %T'
