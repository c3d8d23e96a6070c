//! A guest over each kind of link that gvproxy has: a real Linux stack whose frames `vnet-load guest` carries as
//! the kind of hypervisor would. Each asks for its address, and sends and receives over TCP.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use vnet_tests::{Ended, Running, World, echo, eventually, staged};

/// What the DHCP client calls with each change.
const CONFIGURE: &str = r#"#!/bin/sh
case $reason in
BOUND|REBOOT) ip addr add "$new_ip_address/24" dev "$interface"; ip route replace default via "$new_routers"; echo "$new_ip_address";;
esac
exit 0
"#;

/// Sends a file's worth of bytes to an echo server and compares what comes back.
const TRANSFER: &str = r#"
import hashlib, os, socket, sys, threading
payload = os.urandom(int(sys.argv[1]))
with socket.create_connection(('203.0.113.10', 9000), 30) as s:
    threading.Thread(target=lambda: (s.sendall(payload), s.shutdown(socket.SHUT_WR))).start()
    got = hashlib.sha256()
    while data := s.recv(65536): got.update(data)
print('echoed' if got.digest() == hashlib.sha256(payload).digest() else 'garbled')
"#;
const TRANSFER_BYTES: usize = 3_000_000;

/// A guest that finds its way by DHCP and then does this.
fn guest(world: &World, number: u8, link: &[&str], script: &str) -> std::process::Command {
    let configure = world.file("configure", CONFIGURE);
    world.open_to_all(&configure);
    world.file("transfer.py", TRANSFER);
    let mac = format!("52:54:00:00:00:{number:02x}");
    let client = format!("dhclient -1 -sf ./configure -pf pid{number} -lf leases{number}");
    let script = format!("touch leases{number} && {client} tap0 2>/dev/null && {script}");
    let mut command = world.load();
    command
        .args(["guest", "--no-address", "--mac", &mac])
        .args(link)
        .args(["--", "sh", "-c", &script]);
    command.stdin(Stdio::null());
    command
}

fn transfer() -> String {
    format!("python3 transfer.py {TRANSFER_BYTES}")
}

fn is_served(ended: &Ended, address: &str) {
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (0, format!("{address}\nechoed\n").as_str()),
        "{ended:?}"
    );
}

/// A guest over a socket of this kind, which is its owner's and removed at the end.
fn story(flag: &str, scheme: &str, framing: &str, word: &str) -> impl FnOnce(&World) {
    move |world| {
        let _server = echo(world.internet(), "203.0.113.10:9000");
        let socket = world.runtime_dir().join("vm.sock");
        let url = format!("{scheme}://{}", socket.display());
        let mut up = Running::start(world.command(&["up", "--vm", "web", flag, &url]));
        up.complains(&format!("serving VM web for {word} at {url}"));
        let mode = fs::metadata(&socket).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let path = socket.display().to_string();
        let link = ["--socket", &path, "--framing", framing];
        // Twice: a guest comes and goes, and comes back.
        for _ in 0..2 {
            let ended = Running::start(guest(world, 2, &link, &transfer())).wait();
            is_served(&ended, "192.168.127.2");
            eventually("it is away", || connected(world).is_empty());
        }
        ends_at_once(up, &socket);
    }
}

/// The transports of the VMs that are there.
fn connected(world: &World) -> Vec<String> {
    world
        .list(&["vm", "list"])
        .iter()
        .filter(|vm| {
            vm["state"]
                .as_str()
                .is_some_and(|state| state.ends_with("_ATTACHED"))
        })
        .map(|vm| vm["transport"].as_str().unwrap_or_default().to_owned())
        .collect()
}

fn ends_at_once(up: Running, socket: &Path) {
    let began = Instant::now();
    up.signal(Signal::SIGTERM);
    let ended = up.wait();
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}: {ended:?}",
        began.elapsed()
    );
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!socket.exists(), "{} is left", socket.display());
}

#[test]
fn a_guest_over_qemus_stream_is_served() {
    staged(
        a_guest_over_qemus_stream_is_served,
        story("--listen-qemu", "unix", "qemu", "qemu"),
    );
}

#[test]
fn a_guest_over_a_datagram_socket_is_served() {
    staged(
        a_guest_over_a_datagram_socket_is_served,
        story("--listen-vfkit", "unixgram", "unixgram", "vfkit"),
    );
}

#[test]
fn a_guest_over_a_datagram_socket_that_takes_from_anybody_is_served() {
    staged(
        a_guest_over_a_datagram_socket_that_takes_from_anybody_is_served,
        story("--listen-vfkit", "unixgram", "unixgram-open", "vfkit"),
    );
}

#[test]
fn a_guest_over_records_is_served() {
    staged(
        a_guest_over_records_is_served,
        story("--listen-bess", "unixpacket", "unixpacket", "bess"),
    );
}

#[test]
fn a_guest_behind_vpnkits_handshake_is_served() {
    staged(
        a_guest_behind_vpnkits_handshake_is_served,
        story("--listen-vpnkit", "unix", "vpnkit", "vpnkit"),
    );
}

#[test]
fn two_guests_on_one_datagram_socket_are_served_side_by_side() {
    staged(
        two_guests_on_one_datagram_socket_are_served_side_by_side,
        |world| {
            let _server = echo(world.internet(), "203.0.113.10:9000");
            let socket = world.runtime_dir().join("vm.sock");
            let url = format!("unixgram://{}", socket.display());
            let mut up = Running::start(world.command(&["up", "--vm", "web", "--listen-vfkit", &url]));
            up.complains("serving VM web");
            let path = socket.display().to_string();
            let link = ["--socket", &path, "--framing", "unixgram"];
            // Each waits for the other before it sends, so that both are there at once.
            let script = |own: u8, other: u8| {
                let transfer = transfer();
                format!("touch up{own}; until [ -e up{other} ]; do sleep 0.02; done; {transfer}")
            };
            let first = Running::start(guest(world, 2, &link, &script(2, 3)));
            let up2 = world.work().join("up2");
            eventually("the first has its address", || up2.exists());
            // One is connected, as vfkit's, and one takes datagrams from anybody, as QEMU's.
            let link = ["--socket", &path, "--framing", "unixgram-open"];
            let second = Running::start(guest(world, 3, &link, &script(3, 2)));
            is_served(&first.wait(), "192.168.127.2");
            is_served(&second.wait(), "192.168.127.3");
            // Both may be gone by now.
            let names: Vec<String> = world
                .list(&["events", "list", "--kind", "vm-attached"])
                .iter()
                .map(|event| event["vm"].as_str().unwrap_or_default().to_owned())
                .collect();
            assert!(
                names.contains(&"web".to_owned()) && names.contains(&"web-2".to_owned()),
                "{names:?}"
            );
            ends_at_once(up, &socket);
        },
    );
}

#[test]
fn a_guest_on_standard_input_and_output_is_served_and_ends_it() {
    staged(
        a_guest_on_standard_input_and_output_is_served_and_ends_it,
        |world| {
            let _server = echo(world.internet(), "203.0.113.10:9000");
            let (ours, theirs) = UnixStream::pair().expect("there are sockets");
            let mut command = world.command(&["up", "--vm", "web", "--listen-stdio", "accept"]);
            command.env("RUST_LOG", "debug");
            let up = with_stdio(command, theirs);
            let mut guest = guest(world, 2, &["--on-stdin", "--framing", "short"], &transfer());
            guest.stdin(OwnedFd::from(ours));
            let ended = Running::start_with_input(guest).wait();
            // A word of a log among the frames would end it.
            is_served(&ended, "192.168.127.2");
            let mut up = up;
            let (code, said) = up.wait();
            assert_eq!(code, Some(0), "{said}");
            assert!(
                said.contains("serving VM web on standard input and output"),
                "{said}"
            );
            assert!(said.contains("the last guest is gone"), "{said}");
        },
    );
}

/// A process whose standard input and output are one socket.
struct OnSocket(std::process::Child);

impl OnSocket {
    /// Waits until it ends by itself, and gives what it complained of.
    fn wait(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let mut stderr = self.0.stderr.take().expect("it is piped");
        stderr.read_to_string(&mut said).expect("it is text");
        (self.0.wait().expect("it is a child").code(), said)
    }
}

fn with_stdio(mut command: std::process::Command, socket: UnixStream) -> OnSocket {
    let output = socket.try_clone().expect("there are descriptors");
    command
        .stdin(OwnedFd::from(socket))
        .stdout(OwnedFd::from(output))
        .stderr(Stdio::piped());
    OnSocket(command.spawn().expect("it starts"))
}

#[test]
fn guests_on_inherited_sockets_are_served_and_end_it_with_the_last() {
    staged(
        guests_on_inherited_sockets_are_served_and_end_it_with_the_last,
        |world| {
            let _server = echo(world.internet(), "203.0.113.10:9000");
            let pair = |kind| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC);
            let kinds = [
                (SockType::Stream, "--listen-qemu", "qemu"),
                (SockType::Datagram, "--listen-vfkit", "unixgram"),
                (SockType::SeqPacket, "--listen-bess", "unixpacket"),
            ];
            let mut words = vec!["up".to_owned(), "--vm".to_owned(), "web".to_owned()];
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for (kind, flag, framing) in kinds {
                let (mine, its) = pair(kind).expect("there are sockets");
                fcntl(&its, FcntlArg::F_SETFD(FdFlag::empty())).expect("it is open");
                words.extend([
                    flag.to_owned(),
                    format!("fd://{}?name={framing}", its.as_raw_fd()),
                ]);
                ours.push((mine, framing));
                theirs.push(its);
            }
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let mut up = Running::start(world.command(&words));
            up.complains("serving VM unixpacket for bess at fd://");
            drop(theirs);
            for (number, (socket, framing)) in (2..).zip(ours) {
                assert!(!up.has_ended(), "a guest is still to come: {}", up.stderr());
                let mut guest = guest(world, number, &["--on-stdin", "--framing", framing], &transfer());
                guest.stdin(socket);
                let ended = Running::start_with_input(guest).wait();
                assert_eq!(ended.code, 0, "{framing}: {ended:?}");
                assert!(ended.stdout.ends_with("\nechoed\n"), "{framing}: {ended:?}");
            }
            let ended = up.wait();
            assert_eq!(ended.code, 0, "{ended:?}");
            assert!(ended.stderr.contains("the last guest is gone"), "{ended:?}");
        },
    );
}

#[test]
fn what_was_not_inherited_or_is_of_another_type_is_refused_in_words() {
    staged(
        what_was_not_inherited_or_is_of_another_type_is_refused_in_words,
        |world| {
            let ended = world.try_vnetctl(&["up", "--listen-qemu", "fd://77"]);
            assert_eq!(ended.code, 2, "{ended:?}");
            let expected = "--listen-qemu fd://77: no such descriptor was inherited";
            assert!(ended.stderr.contains(expected), "{ended:?}");

            let (_ours, theirs) = UnixDatagram::pair().expect("there are sockets");
            fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).expect("it is open");
            let url = format!("fd://{}", theirs.as_raw_fd());
            let ended = world.try_vnetctl(&["up", "--listen-qemu", &url]);
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(
                ended.stderr.contains("expected a connected stream socket"),
                "{ended:?}"
            );

            let ended = world.try_vnetctl(&["up", "--listen-stdio", "accept", "--network-policy", "-"]);
            assert_eq!(ended.code, 2, "{ended:?}");
            assert!(ended.stderr.contains("both read standard input"), "{ended:?}");

            // No guest: standard input is a device.
            let ended = world.try_vnetctl(&["up", "--listen-stdio", "accept"]);
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(
                ended.stderr.contains("expected a pipe or socket each"),
                "{ended:?}"
            );
        },
    );
}

#[test]
fn it_ends_at_once_beside_an_idle_client_and_a_busy_one() {
    staged(it_ends_at_once_beside_an_idle_client_and_a_busy_one, |world| {
        let sockets: Vec<PathBuf> = ["q", "v", "b", "p"]
            .map(|name| world.runtime_dir().join(name))
            .into();
        let url = |scheme: &str, at: usize| format!("{scheme}://{}", sockets[at].display());
        let words = [
            ("--listen-qemu", url("unix", 0)),
            ("--listen-vfkit", url("unixgram", 1)),
            ("--listen-bess", url("unixpacket", 2)),
            ("--listen-vpnkit", url("unix", 3)),
        ];
        let words: Vec<&str> = std::iter::once("up")
            .chain(words.iter().flat_map(|(flag, url)| [*flag, url.as_str()]))
            .collect();
        let mut up = Running::start(world.command(&words));
        up.complains("serving VM vm for vpnkit");
        let _idle = UnixStream::connect(&sockets[0]).expect("it listens");
        let mut half = UnixStream::connect(&sockets[3]).expect("it listens");
        half.write_all(b"VMN3T half").expect("it reads");
        let path = sockets[1].display().to_string();
        let link = ["--socket", &path, "--framing", "unixgram"];
        let mut busy = Running::start(guest(
            world,
            2,
            &link,
            "echo busy; while :; do ping -f -c 1000 192.168.127.1 >/dev/null; done",
        ));
        busy.prints("busy");
        ends_at_once(up, &sockets[0]);
        for socket in &sockets {
            assert!(!socket.exists(), "{} is left", socket.display());
        }
        // It had sent on until the end: none came in behind those that were told to end.
        eventually("no VM is left", || world.list(&["vm", "list"]).is_empty());
        busy.signal(Signal::SIGKILL);
    });
}

#[test]
fn whoever_dials_and_says_nothing_keeps_no_guest_out_and_nobody_has_the_hypervisors_address() {
    staged(
        whoever_dials_and_says_nothing_keeps_no_guest_out_and_nobody_has_the_hypervisors_address,
        |world| {
            const PING: &str =
                "ping -q -c 1 -W 5 192.168.127.1 > /dev/null && echo there || echo none; exec sleep 60";
            // More than there may be guests on a socket.
            const MANY: usize = 300;
            let listen = world.runtime_dir().join("listen.sock");
            let url = format!("unix://{}", listen.display());
            let (mut gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1", "-listen", &url]);
            let connect = |mac: &str| {
                let mut load = world.load();
                load.args(["guest", "--framing", "connect", "--mac", mac, "--socket"]);
                load.arg(&listen).args(["--", "sh", "-c", PING]);
                Running::start(load)
            };
            // The address of the guest that the hypervisor has yet to start.
            let mut other = connect("5a:94:ef:e4:0c:ee");
            other.prints("none");
            gvproxy.complains("a lease is kept for it, for a guest of the sockets of hypervisors");

            let dial = |path: &Path, says: &[u8]| {
                let mut stream = UnixStream::connect(path).expect("it listens");
                stream.write_all(says).expect("it is open");
                stream
            };
            let request = b"POST /connect HTTP/1.1\r\nHost: x\r\n\r\n";
            let _silent: Vec<_> = (0..MANY)
                .flat_map(|_| [dial(&socket, b""), dial(&listen, request)])
                .collect();
            let mut guest = world.guest(&socket, &["sh", "-c", PING]);
            guest.prints("there");
            let mut further = connect("5a:94:ef:e4:0c:77");
            further.prints("none");
            eventually("both are there, and the hypervisor's has its address", || {
                let vms = world.list(&["vm", "list"]);
                let has = |address: &str| vms.iter().filter(|vm| vm["addresses"][0] == address).count();
                has("192.168.127.2") == 1
            });
            gvproxy.signal(Signal::SIGTERM);
            assert_eq!(gvproxy.wait().code, 0);
        },
    );
}
