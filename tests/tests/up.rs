//! `up`: what it says when it cannot serve, and how it exits.

use std::os::unix::net::UnixListener;

use vnet_tests::staged;

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
            for (url, cause) in [
                (format!("unix://{}", taken.display()), "something listens there"),
                (tcp, "something listens there"),
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
