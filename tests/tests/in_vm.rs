//! vnet inside a VM, where the kernel is another than this machine's, and may have what this one has not: Debian's,
//! that of 12 is of 2022. There it is as on a host; network namespaces are its guests.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::path::PathBuf;

use vnet_tests::qemu::{Qemu, build_guest, stream};
use vnet_tests::{World, binaries, http, staged};

/// gvproxy over vsock, as podman machine runs it on Hyper-V. `socat` leads what speaks to a Unix socket to a port of
/// vsock. There is no HOME, as a service of the system's has none.
const VSOCK: &str = r#"
for driver in unix_diag vsock vmw_vsock_virtio_transport_common vsock_loopback tun; do
    [ ! -f /lib/modules/$driver.ko ] || insmod /lib/modules/$driver.ko || exit 98
done
ln -s vnetctl /bin/gvproxy
export XDG_RUNTIME_DIR=/run
for port in 1024 1025 1026; do
    socat UNIX-LISTEN:/run/$port,fork VSOCK-CONNECT:1:$port &
done
start() {
    : > /tmp/log
    env -u HOME gvproxy -ssh-port -1 "$@" 2> /tmp/log &
    gvproxy=$!
    until grep -q 'waiting for clients' /tmp/log; do
        kill -0 $gvproxy || { cat /tmp/log; exit 1; }
        sleep 0.1
    done
}
end() {
    kill -TERM $gvproxy
    wait $gvproxy
    echo $1 ended $?
    cat /tmp/log
}
fetch() {
    vnet-load guest --framing $1 --socket /run/$2 --address 192.168.127.$3/24 -- \
        sh -c 'wget -qO- http://203.0.113.10/bytes/300000 | wc -c'
}
ask() { printf 'GET %s HTTP/1.0\r\n\r\n' $1 | socat -t 20 - VSOCK-CONNECT:1:1024 | tr -d '\r' | head -n 1; }

start -listen vsock://:1024 -listen-qemu vsock://:1025 -services unix:///run/services.sock
echo connect $(fetch connect 1024 3)
echo qemu $(fetch qemu 1025 4)
echo stats $(ask /stats)
echo pending $(ask /network/pending)
end first
start -listen vsock://1:1024 -listen-vpnkit vsock://:1026
echo again $(fetch connect 1024 3)
echo vpnkit $(fetch vpnkit 1026 4)
end second
"#;

/// A command with a network and one without. At first the kernel lacks what tells in which namespace a socket was made.
/// One that is too old to hold the number of a process, too, lets nobody speak, and what to do is told.
const RUN: &str = r#"
export XDG_RUNTIME_DIR=/run
echo kernel $(uname -r)
echo without $(vnetctl vm list 2>&1)
for driver in unix_diag tun veth; do
    [ ! -f /lib/modules/$driver.ko ] || insmod /lib/modules/$driver.ko || exit 98
done
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts
fetch() { vnetctl run --secure-mode "$@" -- wget -qO- http://203.0.113.10/fetched 2>&1; }
echo allowed $(fetch --allow 'tcp 203.0.113.10:80')
echo denied $(fetch --deny 'tcp 203.0.113.10:80')
"#;

/// Runs a script in a VM that has our programs and what they call; gives what it printed, and how often the server at
/// 203.0.113.10:80 was asked.
fn inside(world: &World, script: &str) -> (String, usize) {
    let internet = http(world.internet(), "203.0.113.10:80");
    let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
    let netdev = stream(&socket);
    let mut programs = ["vnetctl", "vnet-controlplane", "vnet-dataplane", "vnet-load"]
        .map(binaries::binary)
        .to_vec();
    programs.extend(["/usr/bin/socat", "/sbin/ip"].map(PathBuf::from));
    let qemu = Qemu::boot_with_programs(world, &netdev, "5a:94:ef:e4:0c:ee", script, &programs);
    (qemu.wait(world), internet.requests())
}

/// Whether a kernel has `SO_PEERPIDFD`: since Linux 6.5.
fn holds_processes(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let mut next = || {
        numbers
            .next()
            .and_then(Result::ok)
            .unwrap_or_else(|| panic!("the kernel {release:?}"))
    };
    (next(), next()) >= (6, 5)
}

fn has(said: &str, lines: &[&str]) {
    for line in lines {
        assert!(said.lines().any(|known| known == *line), "no {line:?} in {said}");
    }
}

#[test]
fn a_command_runs_under_another_kernel() {
    build_guest();
    staged(a_command_runs_under_another_kernel, |world| {
        let (said, requests) = inside(world, RUN);
        let line = |word: &str| {
            said.lines()
                .find_map(|line| line.strip_prefix(word))
                .unwrap_or_default()
        };
        let is_told = line("without ").contains("as root: modprobe unix_diag");
        assert_eq!(is_told, !holds_processes(line("kernel ")), "{said}");
        assert_eq!(line("allowed "), "this is 203.0.113.10:80 at /fetched", "{said}");
        assert!(line("denied ").contains("can't connect"), "{said}");
        assert_eq!(requests, 1, "{said}");
    });
}

#[test]
fn guests_and_requests_come_over_vsock() {
    build_guest();
    staged(guests_and_requests_come_over_vsock, |world| {
        let (said, requests) = inside(world, VSOCK);
        has(
            &said,
            &[
                "connect 300000",
                "qemu 300000",
                "stats HTTP/1.0 200 OK",
                "pending HTTP/1.0 403 Forbidden",
                "first ended 0",
                "again 300000",
                "vpnkit 300000",
                "second ended 0",
            ],
        );
        assert_eq!(requests, 4, "{said}");
    });
}
