//! Real virtual machines: QEMU's two socket backends against `vnetctl up` and `gvproxy`, with a Linux that finds its
//! way by DHCP. The guest is built by `guest/make` out of Debian packages, once for a target directory.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vnet_tests::qemu::{GUEST_PATIENCE, Qemu, build_guest, stream};
use vnet_tests::{Answer, Dns, Running, World, http, staged, tcp};

const TRANSFER_BYTES: usize = 10_000_000;

#[test]
fn a_guest_over_a_stream_socket_is_served_and_asked_about() {
    build_guest();
    staged(a_guest_over_a_stream_socket_is_served_and_asked_about, |world| {
        let socket = world.runtime_dir().join("qemu.sock");
        let netdev = stream(&socket);
        let url = format!("unix://{}", socket.display());
        story(world, &["--listen-qemu", &url], &socket, &netdev);
    });
}

#[test]
fn a_guest_over_a_datagram_socket_is_served_and_asked_about() {
    build_guest();
    staged(
        a_guest_over_a_datagram_socket_is_served_and_asked_about,
        |world| {
            let socket = world.runtime_dir().join("vfkit.sock");
            let (netdev, own) = datagrams(world, &socket);
            let url = format!("unixgram://{}", socket.display());
            story(world, &["--listen-vfkit", &url], &socket, &netdev);
            // QEMU leaves its end behind.
            let _ = fs::remove_file(own);
        },
    );
}

#[test]
fn gvproxy_serves_a_machine_over_a_stream_socket_as_podman_uses_it() {
    build_guest();
    staged(
        gvproxy_serves_a_machine_over_a_stream_socket_as_podman_uses_it,
        |world| {
            let socket = world.runtime_dir().join("qemu.sock");
            let netdev = stream(&socket);
            let url = format!("unix://{}", socket.display());
            machine(world, &["-listen-qemu", &url], &socket, &netdev);
        },
    );
}

#[test]
fn gvproxy_serves_a_machine_over_a_datagram_socket_as_podman_uses_it() {
    build_guest();
    staged(
        gvproxy_serves_a_machine_over_a_datagram_socket_as_podman_uses_it,
        |world| {
            let socket = world.runtime_dir().join("vfkit.sock");
            let (netdev, own) = datagrams(world, &socket);
            let url = format!("unixgram://{}", socket.display());
            machine(world, &["-listen-vfkit", &url], &socket, &netdev);
            let _ = fs::remove_file(own);
        },
    );
}

/// QEMU's end of datagrams, and where it is bound.
fn datagrams(world: &World, socket: &Path) -> (String, PathBuf) {
    let own = world.runtime_dir().join("guest.sock");
    let netdev = format!(
        "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        own.display(),
        socket.display()
    );
    (netdev, own)
}

/// A machine of podman's: it has the address that is kept for it, serves at a port which it exposes by asking the
/// gateway, looks up the gateway's names, and fetches from the internet and from the host.
const MACHINE: &str = "
echo address $(ip -4 -o addr show eth0 | awk '{print $4}')
echo host $(nslookup host.containers.internal 192.168.127.1 | awk '/^Address: / {print $2}')
echo internet $(wget -qO- http://203.0.113.10/out)
echo loopback $(wget -qO- http://192.168.127.254:8099/own)
mkdir www && echo of the guest > www/page && httpd -p 80 -h www
expose() { wget -qO- --post-data \"$2\" http://192.168.127.1/services/forwarder/$1 && echo $1 done; }
expose expose '{\"local\":\"127.0.0.1:8080\",\"remote\":\"192.168.127.2:80\",\"protocol\":\"tcp\"}'
until wget -qO- http://192.168.127.254:8099/done | grep -q fetched; do sleep 0.1; done
expose unexpose '{\"local\":\"127.0.0.1:8080\",\"protocol\":\"tcp\"}'
echo listed $(wget -qO- http://192.168.127.1/services/forwarder/all)
";

fn machine(world: &World, listen: &[&str], socket: &Path, netdev: &str) {
    let _internet = http(world.internet(), "203.0.113.10:80");
    let fetched = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&fetched);
    let _own = tcp(world.host(), "127.0.0.1:8099", move |mut stream, _| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let body = if request.starts_with(b"GET /own") {
            "the host's own"
        } else if told.load(Ordering::SeqCst) {
            "fetched"
        } else {
            "not yet"
        };
        let _ = write!(
            stream,
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
    });
    let mut gvproxy = Running::start(world.gvproxy(&[&["-ssh-port", "40222"], listen].concat()));
    gvproxy.complains("waiting for clients");
    let qemu = Qemu::boot(world, netdev, "5a:94:ef:e4:0c:ee", MACHINE);
    let said = || fs::read_to_string(world.work().join("output")).unwrap_or_default();
    let began = Instant::now();
    while !said().contains("expose done") {
        assert!(
            began.elapsed() < GUEST_PATIENCE,
            "{} and {}",
            said(),
            gvproxy.stderr()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut curl = world.program("curl");
    curl.args(["-sS", "-m", "20", "http://127.0.0.1:8080/page"]);
    assert_eq!(Running::start(curl).wait().stdout, "of the guest\n");
    fetched.store(true, Ordering::SeqCst);
    let said = qemu.wait(world);
    for line in [
        "address 192.168.127.2/24",
        "host 192.168.127.254",
        "internet this is 203.0.113.10:80 at /out",
        "loopback the host's own",
        "unexpose done",
        // Its own alone: what leads to its SSH is the host's.
        "listed []",
    ] {
        assert!(said.lines().any(|known| known == line), "no {line:?} in {said}");
    }
    assert!(std::net::TcpStream::connect("127.0.0.1:8080").is_err(), "{said}");

    gvproxy.signal(nix::sys::signal::Signal::SIGTERM);
    let ended = gvproxy.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!socket.exists(), "its socket is gone");
}

/// What the guest does, in order; each line that it prints is checked below.
const SCRIPT: &str = "
echo mtu $(cat /sys/class/net/eth0/mtu)
echo address $(ip -4 -o addr show eth0 | awk '{print $4}')
echo name $(nslookup srv.example 192.168.127.1 | awk '/^Address: / {print $2}')
udhcpc -f -i eth0 -t 20 -T 1 -p /tmp/pid -s /etc/udhcpc.script > /tmp/dhcp 2>&1 &
leases() { grep -c 'lease of 192.168.127.2 obtained' /tmp/dhcp; }
until [ $(leases) = 1 ]; do sleep 0.1; done
kill -USR1 $(cat /tmp/pid)
for i in $(seq 100); do [ $(leases) = 1 ] || break; sleep 0.1; done
kill $!
echo leases $(leases) $(cat /tmp/dhcp)
echo ping $(ping -c 1 -W 5 192.168.127.1 | grep -c 'bytes from')
echo held $(wget -qO- http://198.51.100.7/held)
echo denied $(nc 198.51.100.7 81 < /dev/null 2>&1)
head -c 10000000 /dev/urandom > /tmp/up
nc 203.0.113.10 9000 < /tmp/up > /tmp/answer
echo up $(md5sum < /tmp/up) $(cat /tmp/answer)
wget -qO /tmp/down http://203.0.113.10:8000/ && echo down $(md5sum < /tmp/down)
";

fn story(world: &World, listen: &[&str], socket: &Path, netdev: &str) {
    let payload = random_bytes(TRANSFER_BYTES);
    let payload_file = world.work().join("payload");
    fs::write(&payload_file, &payload).unwrap();
    let payload_sum = md5(&payload_file);
    let collected = world.work().join("collected");
    let wanted = collected.clone();
    let _sink = tcp(world.internet(), "203.0.113.10:9000", move |mut stream, _| {
        let mut bytes = Vec::new();
        if stream.read_to_end(&mut bytes).is_ok() && fs::write(&wanted, &bytes).is_ok() {
            let _ = stream.write_all(md5(&wanted).as_bytes());
        }
    });
    let _source = tcp(world.internet(), "203.0.113.10:8000", move |mut stream, _| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let _ = write!(
            stream,
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
            payload.len()
        );
        let _ = stream.write_all(&payload);
        let _ = stream.shutdown(Shutdown::Write);
    });
    let held = http(world.internet(), "198.51.100.7:80");
    let denied = http(world.internet(), "198.51.100.7:81");
    let dns = Dns::serve(
        world.internet(),
        "203.0.113.10:53",
        &[("srv.example", Answer::A("203.0.113.10"))],
    );

    let mut words = vec!["up", "--secure-mode", "--vm", "machine"];
    words.extend(listen);
    words.extend([
        "--allow",
        "tcp 203.0.113.10:8000-9000",
        "--allow",
        "domain srv.example",
    ]);
    let mut up = Running::start(world.command(&words));
    // QEMU would run on with a dead NIC.
    up.complains("serving VM machine");
    assert!(socket.exists(), "{}", socket.display());

    let qemu = Qemu::boot(world, netdev, "52:54:00:12:34:56", SCRIPT);
    let id = first_pending_for(world, 80);
    assert_eq!(held.connections(), 0, "nothing goes out before the yes");
    world.vnetctl(&["approve", &id]);
    let id = first_pending_for(world, 81);
    world.vnetctl(&["deny", &id]);
    let said = qemu.wait(world);

    let line = |word: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {word} in {said}"))
            .to_owned()
    };
    assert_eq!(line("mtu"), "1500");
    assert_eq!(line("address"), "192.168.127.2/24");
    assert_eq!(line("name"), "203.0.113.10");
    assert_eq!(dns.asked_for("srv.example"), 2, "A and AAAA: {:?}", dns.asked());
    assert!(
        line("leases").starts_with("2 "),
        "a new lease, then the renewal of it: {said}"
    );
    assert_eq!(line("ping"), "1");
    assert_eq!(line("held"), "this is 198.51.100.7:80 at /held");
    assert!(line("denied").contains("refused"), "{said}");
    assert_eq!((held.connections(), denied.connections()), (1, 0));
    let up_line = line("up").replace(" -", "");
    let sums: Vec<&str> = up_line.split_whitespace().collect();
    assert_eq!((sums.len(), sums[0]), (2, sums[1]), "{up_line}");
    assert_eq!(line("down").replace(" -", "").trim(), payload_sum);

    up.signal(nix::sys::signal::Signal::SIGTERM);
    let ended = up.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!socket.exists(), "up removes its socket");
}

fn first_pending_for(world: &World, port: u16) -> String {
    let wanted = format!(":{port}");
    let began = Instant::now();
    loop {
        let pending = world.pending();
        let about = |item: &&serde_json::Value| item["target"].to_string().contains(&wanted);
        if let Some(id) = pending.iter().find(about).and_then(|item| item["id"].as_str()) {
            return id.to_owned();
        }
        let output = fs::read_to_string(world.work().join("output")).unwrap_or_default();
        assert!(
            began.elapsed() < GUEST_PATIENCE,
            "port {port} is not asked about; pending: {pending:?}; the guest said: {output}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn random_bytes(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("there is randomness");
    bytes
}

fn md5(file: &Path) -> String {
    let output = Command::new("md5sum")
        .arg(file)
        .output()
        .expect("md5sum (package coreutils)");
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}
