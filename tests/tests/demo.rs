//! The demo: it tells the whole story without a network, and does not claim what did not happen.

use vnet_tests::{Running, binaries, staged};

#[test]
fn demo_tells_the_story_end_to_end_offline() {
    staged(demo_tells_the_story_end_to_end_offline, |world| {
        let ended = world.try_vnetctl(&["demo"]);
        assert_eq!(ended.code, 0, "{ended:?}");
        // In this order: what was typed, and what came of it.
        let mut rest = ended.stdout.as_str();
        for told in [
            "--secure-mode -- fetch 198.51.100.7:80",
            "vnetctl pending list",
            "tcp 198.51.100.7:80",
            "vnetctl approve ",
            "bytes came back",
            "vnetctl deny ",
            "Connection refused",
            "domain asked.example",
            "bytes came back",
            "allowed.example:80",
            "bytes came back",
            "blocked.example:80",
            "failed to lookup",
            "vnetctl events list",
            "dns-denied",
            "flow-opened",
            "Every step happened.",
        ] {
            let at = rest
                .find(told)
                .unwrap_or_else(|| panic!("no {told:?} in the rest: {ended:?}"));
            rest = &rest[at + told.len()..];
        }
        // Its controlplane was its own and is gone with it.
        world.is_clean();
        assert!(!world.control_socket().exists());
    });
}

#[test]
fn demo_that_cannot_happen_fails_and_names_the_remedy() {
    staged(demo_that_cannot_happen_fails_and_names_the_remedy, |world| {
        let mut command = world.program("sh");
        command
            .args([
                "-c",
                "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" demo",
            ])
            .arg(binaries::binary("vnetctl"));
        let ended = Running::start(command).wait();
        assert_ne!(ended.code, 0, "{ended:?}");
        assert!(
            ended.stderr.contains("sysctl -w user.max_user_namespaces"),
            "{ended:?}"
        );
        assert!(!ended.stdout.contains("Every step happened"), "{ended:?}");
    });
}
