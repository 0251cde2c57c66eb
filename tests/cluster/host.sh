#!/bin/bash
# One host of the lab: runs as process 1 of its own PID, mount, UTS, IPC and network namespaces, and ends as sshd.
# usage: host.sh LAB NAME
set -euo pipefail
lab=$1 name=$2
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount --bind "$lab/$name/tmp" /tmp
{ echo "root:x:0:0:root:$lab/$name/home:/bin/bash"; echo 'sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin'; } > /run/passwd
grep -v -e ^root: -e ^sshd: /etc/passwd >> /run/passwd
mount --bind /run/passwd /etc/passwd
mount --bind "$lab/hosts" /etc/hosts
hostname "$name"
cat > /run/sshd_config <<C
HostKey $lab/host_key
AuthorizedKeysFile $lab/key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
C
exec /usr/sbin/sshd -D -e -f /run/sshd_config
