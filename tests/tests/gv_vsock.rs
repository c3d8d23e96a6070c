//! gvproxy over vsock, as podman machine runs it on Hyper-V: real sockets of that family, between processes of a
//! kernel that has them. The kernel of this machine need not, so that all of it happens in a VM: there gvproxy
//! listens, and network namespaces are its guests.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::path::PathBuf;

use vnet_tests::qemu::{Qemu, build_guest};
use vnet_tests::{binaries, http, staged};

/// What the VM does, in order; each line that it prints is checked below. `socat` leads what speaks to a Unix socket to
/// a port of vsock. gvproxy has no HOME, as a service of the system's has none.
const SCRIPT: &str = r#"
for driver in unix_diag vsock vmw_vsock_virtio_transport_common vsock_loopback tun; do
    insmod /lib/modules/$driver.ko 2> /dev/null
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

#[test]
fn guests_and_requests_come_over_vsock() {
    build_guest();
    staged(guests_and_requests_come_over_vsock, |world| {
        let internet = http(world.internet(), "203.0.113.10:80");
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
        let netdev = format!(
            "stream,id=n0,server=off,addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut programs: Vec<PathBuf> = ["vnetctl", "vnet-controlplane", "vnet-dataplane", "vnet-load"]
            .map(binaries::binary)
            .to_vec();
        programs.extend([PathBuf::from("/usr/bin/socat"), PathBuf::from("/sbin/ip")]);
        let said =
            Qemu::boot_with_programs(world, &netdev, "5a:94:ef:e4:0c:ee", SCRIPT, &programs).wait(world);
        for line in [
            "connect 300000",
            "qemu 300000",
            "stats HTTP/1.0 200 OK",
            "pending HTTP/1.0 403 Forbidden",
            "first ended 0",
            "again 300000",
            "vpnkit 300000",
            "second ended 0",
        ] {
            assert!(said.lines().any(|known| known == line), "no {line:?} in {said}");
        }
        assert_eq!(internet.requests(), 4, "{said}");
    });
}
