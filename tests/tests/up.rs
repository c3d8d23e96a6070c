//! `up`: whom it serves at once, what it says when it cannot serve, and how it exits.

use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::signal::Signal;
use vnet_tests::{Running, World, eventually, http, staged};

/// Fetches a page as a guest behind a socket.
fn fetch(world: &World, socket: &Path, framing: &str, address: &str) -> Running {
    let mut guest = world.load();
    guest.args(["guest", "--framing", framing, "--address", address, "--socket"]);
    guest.arg(socket);
    guest.args([
        "--",
        "curl",
        "-sS",
        "--retry",
        "5",
        "--retry-connrefused",
        "http://203.0.113.10/",
    ]);
    Running::start(guest)
}

#[test]
fn guests_over_tcp_and_over_datagrams_are_served_by_one_up() {
    staged(guests_over_tcp_and_over_datagrams_are_served_by_one_up, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let datagrams = world.runtime_dir().join("vfkit.sock");
        let vfkit = format!("unixgram://{}?name=dgram", datagrams.display());
        let qemu = "tcp://127.0.0.1:7007?name=stream";
        let words = [
            "up",
            "--listen-qemu",
            qemu,
            "--listen-vfkit",
            &vfkit,
            "--allow",
            "tcp 203.0.113.10:80",
        ];
        let mut up = Running::start(world.command(&words));
        let said = up.complains("what is held is listed by");
        assert!(
            said.contains("serving VM stream for qemu at tcp://127.0.0.1:7007")
                && said.contains("serving VM dgram for vfkit at unixgram://"),
            "{said}"
        );

        // A guest is in a namespace of its own, from where no loopback of the host's is in reach.
        let relay = world.work().join("relay.sock");
        let mut socat = world.program("socat");
        socat.arg(format!("UNIX-LISTEN:{}", relay.display()));
        socat.arg("TCP:127.0.0.1:7007");
        let _relay = Running::start(socat);
        let guests = [
            fetch(world, &relay, "qemu", "192.168.127.2/24"),
            fetch(world, &datagrams, "unixgram", "192.168.127.3/24"),
        ];
        for guest in guests {
            let ended = guest.wait();
            assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n", "{ended:?}");
        }
        assert_eq!(server.connections(), 2);
        for vm in ["stream", "dgram"] {
            eventually("the flow is in the history under its VM's name", || {
                !world
                    .list(&["events", "list", "--vm", vm, "--kind", "flow-opened"])
                    .is_empty()
            });
        }

        up.signal(Signal::SIGTERM);
        let ended = up.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(!datagrams.exists(), "up removes its socket");
        // The controlplane that it started ends by itself, a minute after the last that needed it.
        assert_eq!(world.processes("__controlplane").len(), 1);
        assert_eq!(world.processes("--idle-exit 60").len(), 1);
    });
}

#[test]
fn a_published_port_leads_to_the_guest_and_closes_with_up() {
    staged(a_published_port_leads_to_the_guest_and_closes_with_up, |world| {
        let (up, socket) = world.up(&["--secure-mode", "-p", "127.0.0.1:8088:80"]);
        let mut guest = world.load();
        // A guest whose address is its own choice is found there once it has spoken.
        guest.args(["guest", "--socket", &socket, "--", "sh", "-c"]);
        guest.arg(
            "ping -c 1 -W 5 192.168.127.1; exec socat tcp-listen:80,fork,reuseaddr 'system:echo from the guest'",
        );
        let _guest = Running::start(guest);
        let fetch = || {
            let mut command = world.program("socat");
            command.args(["-T2", "-", "tcp:127.0.0.1:8088"]);
            Running::start(command).wait()
        };
        eventually("the guest answers", || fetch().stdout == "from the guest\n");
        up.signal(Signal::SIGTERM);
        let ended = up.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_ne!(fetch().code, 0, "the port is closed again");
    });
}

#[test]
fn a_socket_that_cannot_be_opened_is_named_with_its_cause_and_nothing_is_said_to_be_served() {
    staged(
        a_socket_that_cannot_be_opened_is_named_with_its_cause_and_nothing_is_said_to_be_served,
        |world| {
            let taken = world.work().join("taken.sock");
            let _holder = UnixListener::bind(&taken).unwrap();
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let tcp = format!("tcp://{}", port.local_addr().unwrap());
            let nowhere = world.work().join("nowhere/q.sock");
            let file = world.file("a-file", "a person's");
            for (url, cause) in [
                (format!("unix://{}", taken.display()), "something listens there"),
                (tcp, "something listens there"),
                (format!("unix://{}", file.display()), "is a file; move it away"),
                (
                    format!("unix://{}", nowhere.display()),
                    "its directory is not there",
                ),
            ] {
                let up = world.try_vnetctl(&["up", "--listen-qemu", &url]);

                assert_eq!(up.code, 1, "{url}: {up:?}");
                assert!(
                    up.stderr.contains("cannot be opened") && up.stderr.contains(cause),
                    "{url}: {up:?}"
                );
                assert!(!up.stderr.contains("serving"), "{url}: {up:?}");
            }
        },
    );
}

#[test]
fn what_is_wrong_with_its_flags_is_a_matter_of_usage() {
    staged(what_is_wrong_with_its_flags_is_a_matter_of_usage, |world| {
        for (flags, said) in [
            (&[][..], "no guest can attach"),
            (&["--listen-qemu", "foo"], "--listen-qemu foo"),
            (
                &["--listen-qemu", "tcp://0.0.0.0:99"],
                "--listen-qemu tcp://0.0.0.0:99",
            ),
            (
                &["--listen-qemu", "unix:///tmp/q.sock", "--allow", "tpc 1.2.3.4"],
                "--allow: ",
            ),
            (&["--listen-qemu", "unix:///tmp/q.sock", "--mtu", "1"], "--mtu 1"),
        ] {
            let up = world.try_vnetctl(&[&["up"], flags].concat());

            assert_eq!(up.code, 2, "{flags:?}: {up:?}");
            assert!(up.stderr.contains(said), "{flags:?}: {up:?}");
        }
        let missing = world.try_vnetctl(&[
            "up",
            "--listen-qemu",
            "unix:///tmp/q.sock",
            "--network-policy",
            "/nonexistent.yaml",
        ]);
        assert_eq!(
            missing.code, 1,
            "a file that cannot be read was typed right: {missing:?}"
        );
    });
}
