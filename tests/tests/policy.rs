//! The policy file from its author's side: lists beside it, tests inside it, and what is said of either.
#![cfg(target_os = "linux")]

use std::fs;

use nix::sys::signal::Signal;
use vnet_tests::{Running, World, eventually, http, staged};

const LISTED: &str = "version: 1\nsets:\n  web: {file: lists/web.txt}\nrules:\n  - {name: listed, action: allow, cidrs: \"@web\", ports: [80]}\n";

/// Puts a list beside the policies.
fn list(world: &World, content: &str) {
    let dir = world.work().join("lists");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("web.txt"), content).unwrap();
}

#[test]
fn a_run_under_a_policy_with_a_list_reaches_what_the_list_has() {
    staged(
        a_run_under_a_policy_with_a_list_reaches_what_the_list_has,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let other = http(world.internet(), "198.51.100.7:80");
            list(world, "# where it may go\n203.0.113.10\n");
            let file = world.file("listed.yaml", LISTED);
            let ended = world.script(
                &["--network-policy", file.to_str().unwrap()],
                "curl -sS http://203.0.113.10/; curl -sS http://198.51.100.7/; echo $?",
            );
            assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n7\n", "{ended:?}");
            assert_eq!((server.connections(), other.connections()), (1, 0));
        },
    );
}

#[test]
fn a_hang_up_takes_a_good_file_as_the_next_revision_and_a_bad_one_changes_nothing() {
    staged(
        a_hang_up_takes_a_good_file_as_the_next_revision_and_a_bad_one_changes_nothing,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let file = world.file("policy.yaml", "defaultAction: deny\n");
            let mut command = world.program("vnet-controlplane");
            command.args(["--network-policy", file.to_str().unwrap()]);
            let mut controlplane = Running::start(command);
            eventually("it serves", || world.control_socket().exists());
            let in_force = || {
                let shown = world.json(&["policy", "show"]);
                let revision: u64 = shown["revision"].as_str().unwrap().parse().unwrap();
                (revision, shown["document"].as_str().unwrap().to_owned())
            };
            let fetch = || {
                world
                    .run(&[], &["curl", "-sS", "http://203.0.113.10/"])
                    .wait()
                    .code
            };
            let first = in_force();
            assert_eq!(first.1, "defaultAction: deny\n");

            world.file("policy.yaml", "defaultAction: Allow\n");
            controlplane.signal(Signal::SIGHUP);
            controlplane.complains("the policy in force stays");
            assert_eq!(in_force(), first);
            assert_eq!(fetch(), 7);

            world.file("policy.yaml", "defaultAction: allow\n");
            controlplane.signal(Signal::SIGHUP);
            eventually("the next revision is in force", || in_force().0 == first.0 + 1);
            assert_eq!(in_force().1, "defaultAction: allow\n");
            assert_eq!((fetch(), server.connections()), (0, 1));
        },
    );
}

#[test]
fn an_applied_policy_keeps_the_list_that_came_with_it() {
    staged(an_applied_policy_keeps_the_list_that_came_with_it, |world| {
        http(world.internet(), "203.0.113.10:80");
        list(world, "203.0.113.10\n");
        let file = world.file("listed.yaml", LISTED);
        world.vnetctl(&["policy", "apply", file.to_str().unwrap()]);
        // The file changed, and nothing reads it: only an apply would.
        list(world, "198.51.100.1\n");
        let fetch = "curl -sS http://203.0.113.10/; echo $?";
        assert_eq!(
            world.script(&[], fetch).stdout,
            "this is 203.0.113.10:80 at /\n0\n"
        );
        let shown = world.json(&["policy", "show"]);
        assert_eq!(shown["lists"][0]["path"], "lists/web.txt", "{shown}");
        assert!(
            shown["lists"][0]["content"]
                .as_str()
                .unwrap_or_default()
                .is_empty()
        );
        world.vnetctl(&["policy", "apply", file.to_str().unwrap()]);
        assert_eq!(world.script(&[], fetch).stdout, "7\n");
        world.vnetctl(&["policy", "rollback"]);
        assert_eq!(
            world.script(&[], fetch).stdout,
            "this is 203.0.113.10:80 at /\n0\n"
        );
    });
}

#[test]
fn what_is_wrong_with_a_list_is_told_by_line_and_never_quoted() {
    staged(
        what_is_wrong_with_a_list_is_told_by_line_and_never_quoted,
        |world| {
            let file = world.file("listed.yaml", LISTED);
            for (content, expected) in [
                (
                    "203.0.113.10\nhunter2 secret\n",
                    "lists/web.txt:2:1: the line is not plain",
                ),
                ("# none\n", "has no entry; is it the right file?"),
            ] {
                list(world, content);
                for verb in ["check", "apply", "test"] {
                    let ended = world.try_vnetctl(&["policy", verb, file.to_str().unwrap()]);
                    assert_eq!(ended.code, 1, "{ended:?}");
                    assert!(ended.stderr.contains(expected), "{ended:?}");
                    assert!(!ended.stderr.contains("hunter2"), "{ended:?}");
                }
            }
            fs::remove_file(world.work().join("lists/web.txt")).unwrap();
            let absent = world.try_vnetctl(&["policy", "check", file.to_str().unwrap()]);
            assert!(
                absent.stderr.contains("cannot read list \"lists/web.txt\""),
                "{absent:?}"
            );
            let device = world.file("device.yaml", &LISTED.replace("lists/web.txt", "/dev/zero"));
            let device = world.try_vnetctl(&["policy", "check", device.to_str().unwrap()]);
            assert!(device.stderr.contains("is not a regular file"), "{device:?}");
        },
    );
}

#[test]
fn tests_inside_a_policy_are_run_before_anything_else_is() {
    staged(tests_inside_a_policy_are_run_before_anything_else_is, |world| {
        let rules =
            "version: 1\nrules:\n  - {name: web, action: allow, cidr: 203.0.113.0/24, ports: [80]}\ntests:\n";
        let good = world.file(
            "good.yaml",
            &format!("{rules}  - {{allow: \"tcp 203.0.113.10:80\", deny: \"tcp 203.0.113.10:22\"}}\n"),
        );
        let said = world.vnetctl(&["policy", "test", good.to_str().unwrap()]);
        assert!(
            said.contains("2 destinations come out as its tests say"),
            "{said}"
        );
        let bad = world.file(
            "bad.yaml",
            &format!("{rules}  - {{allow: \"tcp 203.0.113.10:22\"}}\n"),
        );
        let expected = "bad.yaml:5:13: tests[0]: \"tcp 203.0.113.10:22\" is deny for test (expected allow)";
        for verb in ["test", "check", "apply"] {
            let ended = world.try_vnetctl(&["policy", verb, bad.to_str().unwrap()]);
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(ended.stderr.contains(expected), "{ended:?}");
        }
        let run = world
            .run(
                &["--network-policy", bad.to_str().unwrap()],
                &["touch", "started"],
            )
            .wait();
        assert_eq!(run.code, 125, "{run:?}");
        assert!(!world.work().join("started").exists());
        let none = world.file("none.yaml", "version: 1\n");
        let none = world.try_vnetctl(&["policy", "test", none.to_str().unwrap()]);
        assert!(none.code == 1 && none.stderr.contains("has no tests"), "{none:?}");
    });
}

/// Loads, and may surprise: in each of these ways.
const SURPRISING: &str = "\
version: 1
rules:
  - {name: anybody, action: allow, domains: ['*.co.uk'], ports: [443]}
  - {name: wide, action: allow, cidr: 0.0.0.0/0}
  - {name: late, action: deny, cidr: 203.0.113.0/24, ports: [81]}
  - {name: over, action: allow, cidr: 198.51.100.0/24, ports: [80], until: 2020-01-01T00:00:00Z}
dns:
  allowedDomains: [co.uk]
";

#[test]
fn what_may_surprise_is_told_by_check_and_by_run_and_stops_neither() {
    staged(
        what_may_surprise_is_told_by_check_and_by_run_and_stops_neither,
        |world| {
            world.file("surprising.yaml", SURPRISING);
            let check = world.try_vnetctl(&["policy", "check", "surprising.yaml"]);
            let run = world
                .run(&["--network-policy", "surprising.yaml"], &["echo", "ran"])
                .wait();
            for ended in [&check, &run] {
                assert_eq!(ended.code, 0, "{ended:?}");
                for (line, what) in [
                    (1, "dns.allowedDomains has co.uk, and co.uk is a public suffix"),
                    (
                        3,
                        "anybody: co.uk is a public suffix: anyone may own a name below it",
                    ),
                    (
                        4,
                        "wide allows every IPv4 destination, but for guarded ones (metadata, the host,",
                    ),
                    (5, "late can never match"),
                    (6, "over can never match: its until is in the past"),
                ] {
                    let told = |said: &str| {
                        said.contains(&format!("warning: surprising.yaml:{line}:")) && said.contains(what)
                    };
                    assert!(ended.stderr.lines().any(told), "{line}: {what}: {ended:?}");
                }
            }
            assert_eq!(run.stdout, "ran\n", "{run:?}");
        },
    );
}

#[test]
fn a_run_that_rewrites_its_policy_is_warned_of_and_does_not_read_it_again() {
    staged(
        a_run_that_rewrites_its_policy_is_warned_of_and_does_not_read_it_again,
        |world| {
            let servers = [
                http(world.internet(), "203.0.113.10:80"),
                http(world.internet(), "198.51.100.7:80"),
            ];
            let file = world.file("policy.yaml", "version: 1\n");
            let path = file.to_str().unwrap();
            let script = "curl -sS http://203.0.113.10/; echo $?
                printf 'version: 1\\ndefaultAction: allow\\n' > policy.yaml && echo rewritten
                curl -sS http://203.0.113.10/; echo $?; curl -sS http://198.51.100.7/; echo $?";
            let ended = world.script(&["--network-policy", path], script);
            assert_eq!(ended.stdout, "7\nrewritten\n7\n7\n", "{ended:?}");
            let warning = format!("warning: {path} can be written from inside this run; it was read once");
            assert!(ended.stderr.contains(&warning), "{ended:?}");
            assert!(servers.iter().all(|server| server.connections() == 0));

            // The next one reads what this one left, as the warning says, unless it cannot be written.
            std::fs::create_dir(world.work().join("out")).unwrap();
            let words = ["--network-policy", path, "--write", "out"];
            let ended = world.script(
                &words,
                "curl -sS http://198.51.100.7/; echo > policy.yaml || echo kept",
            );
            assert!(ended.stdout.ends_with("kept\n"), "{ended:?}");
            assert!(!ended.stderr.contains("can be written from inside"), "{ended:?}");
            assert_eq!(servers[1].connections(), 1);
        },
    );
}

#[test]
fn the_schema_is_printed_as_it_is_published() {
    staged(the_schema_is_printed_as_it_is_published, |world| {
        let published = include_str!("../../docs/policy.schema.json");
        assert_eq!(world.vnetctl(&["policy", "schema"]), published);
    });
}

#[test]
fn a_confirmed_policy_stays_and_an_unconfirmed_one_leaves_what_was() {
    staged(
        a_confirmed_policy_stays_and_an_unconfirmed_one_leaves_what_was,
        |world| {
            http(world.internet(), "203.0.113.10:80");
            let open = world.file("open.yaml", "version: 1\ndefaultAction: allow\n");
            let shut = world.file("shut.yaml", "version: 1\n");
            let revision = |world: &World| world.json(&["policy", "show"])["revision"].clone();
            world.vnetctl(&["policy", "apply", open.to_str().unwrap()]);
            let mut run = world.run(&["--vm", "web"], &["curl", "-sSN", "http://203.0.113.10/drip"]);
            run.prints("...");
            let applied = world.vnetctl(&[
                "policy",
                "apply",
                shut.to_str().unwrap(),
                "--confirm-within",
                "2s",
            ]);
            assert!(
                applied.contains("1 live flow on 1 dataplane was cut"),
                "{applied}"
            );
            assert_ne!(run.wait().code, 0);
            vnet_tests::eventually("it goes by itself", || revision(world) == "3");
            let notes: Vec<_> = world.list(&["policy", "revisions"]);
            assert_eq!(notes[0]["appliedBy"], "vnet", "{notes:?}");
            assert!(world.vnetctl(&["policy", "revisions"]).contains("not confirmed"));

            world.vnetctl(&[
                "policy",
                "apply",
                shut.to_str().unwrap(),
                "--confirm-within",
                "60s",
            ]);
            assert!(
                world
                    .vnetctl(&["policy", "revisions"])
                    .contains("unless confirmed")
            );
            let other = world.try_vnetctl(&["policy", "confirm", "--revision", "3"]);
            assert!(
                other.code == 1 && other.stderr.contains("revision 4 of policy default awaits"),
                "{other:?}"
            );
            let said = world.vnetctl(&["policy", "confirm", "--revision", "4"]);
            assert_eq!(said, "revision 4 of policy default stays\n");
            assert!(world.json(&["policy", "show"])["confirmUntil"].is_null());
            for wrong in ["0s", "25h"] {
                let refused = world.try_vnetctl(&[
                    "policy",
                    "apply",
                    shut.to_str().unwrap(),
                    "--confirm-within",
                    wrong,
                ]);
                assert!(
                    refused.code == 1 && refused.stderr.contains("1 s to 24 h"),
                    "{refused:?}"
                );
            }
        },
    );
}
