//! `vnetctl run`: a command behind a network of its own that asks.
#![cfg(target_os = "linux")]

use vnet_tests::{http, staged};

#[test]
fn a_held_connection_completes_once_it_is_approved_elsewhere() {
    staged(
        a_held_connection_completes_once_it_is_approved_elsewhere,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let mut run = world.run(
                &["--secure-mode", "--vm", "web"],
                &["curl", "-sS", "--retry", "0", "http://203.0.113.10/story"],
            );
            let id = world.first_pending_id();
            let line = run.complains(&id);
            assert_eq!(
                line,
                format!(
                    "vnet: web asks for tcp 203.0.113.10:80 (answer: vnetctl approve {id}, or vnetctl deny {id})\n"
                )
            );
            assert_eq!(server.connections(), 0, "nothing goes out before the yes");
            world.vnetctl(&["approve", &id]);
            let ended = run.wait();
            assert_eq!(
                (ended.code, ended.stdout.as_str()),
                (0, "this is 203.0.113.10:80 at /story\n"),
                "{ended:?}"
            );
            assert_eq!(server.connections(), 1, "the same connection");
            world.is_clean();
        },
    );
}
