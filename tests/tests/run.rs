//! `vnetctl run`: what a command finds, how it ends, and what is left of it.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vnet_tests::{
    PATIENCE, Person, Running, World, as_ordinary_user, descendants, eventually, http, staged, udp_echo,
};
use vnetctl::terminal::GRACE;

const SERVER: &str = "http://203.0.113.10/";
/// curl: it could not connect.
const REFUSED: i32 = 7;

#[test]
fn status_of_the_command_is_the_status_of_the_run() {
    staged(status_of_the_command_is_the_status_of_the_run, |world| {
        for (script, code) in [
            ("exit 0", 0),
            ("exit 3", 3),
            ("kill -9 $$", 137),
            ("kill -TERM $$", 143),
        ] {
            let ended = world.script(&[], script);
            assert_eq!(
                (ended.code, ended.stderr.as_str()),
                (code, ""),
                "{script}: {ended:?}"
            );
        }
        let absent = world.run(&[], &["/nonexistent/command"]).wait();
        assert_eq!(absent.code, 127, "{absent:?}");
        assert!(absent.stderr.contains("/nonexistent/command"), "{absent:?}");
        let file = world.file("no-program", "text");
        let not_executable = world.run(&[], &[file.to_str().unwrap()]).wait();
        assert_eq!(not_executable.code, 126, "{not_executable:?}");
        for wrong in [
            &["run", "--no-such-flag", "--", "true"][..],
            &["run"],
            &["--server", "unix:///nonexistent/sock", "run", "--", "true"],
        ] {
            let ended = world.try_vnetctl(wrong);
            assert_eq!(ended.code, 125, "{wrong:?}: {ended:?}");
            assert_ne!(ended.stderr, "", "{wrong:?}");
        }
        world.is_clean();
    });
}

#[test]
fn output_and_input_are_the_commands() {
    staged(output_and_input_are_the_commands, |world| {
        let input = world.file("input", "one\ntwo\n");
        let mut command = world.command(&["run", "--", "sh", "-c", "cat; echo three >&2"]);
        command.stdin(fs::File::open(input).unwrap());
        let ended = Running::start_with_input(command).wait();
        assert_eq!(
            (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
            (0, "one\ntwo\n", "three\n")
        );
    });
}

#[test]
fn command_has_a_network_and_a_process_tree_of_its_own_and_no_privilege() {
    staged(
        command_has_a_network_and_a_process_tree_of_its_own_and_no_privilege,
        |world| {
            let ended = world.script(
            &[],
            "grep -E '^(Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs)' /proc/self/status; \
             echo processes $(ls /proc | grep -cE '^[0-9]+$') below $(cat /proc/1/comm); \
             ip -br addr show dev eth0 | grep -o '192.168.127.2/24'; ip route | head -1; ls /proc/self/fd | tr '\\n' ' '; \
             cat /etc/resolv.conf",
        );
            assert_eq!(ended.code, 0, "{ended:?}");
            // Its init, the shell and those of the pipe; none of the host's.
            let (_, processes) = ended.stdout.split_once("processes ").unwrap();
            let (count, init) = processes.split_once(" below ").unwrap();
            assert!((3..=6).contains(&count.parse().unwrap()), "{ended:?}");
            assert!(init.starts_with("vnet-guest\n"), "{ended:?}");
            for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert!(
                    ended.stdout.contains(&format!("{set}:\t0000000000000000")),
                    "{ended:?}"
                );
            }
            for part in [
                "NoNewPrivs:\t1",
                "192.168.127.2/24",
                "default via 192.168.127.1",
                "0 1 2 3 ",
                "nameserver 192.168.127.1\noptions timeout:30 attempts:2\n",
            ] {
                assert!(ended.stdout.contains(part), "{part:?} is not in {ended:?}");
            }
        },
    );
}

#[test]
fn without_policy_or_mode_a_command_reaches_what_it_wants() {
    staged(without_policy_or_mode_a_command_reaches_what_it_wants, |world| {
        let server = http(world.internet(), "198.51.100.7:80");
        let ended = world.run(&[], &["curl", "-sS", "http://198.51.100.7/"]).wait();
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
        assert_eq!(server.requests(), 1);
        world.is_clean();
    });
}

#[test]
fn allow_and_deny_rules_decide_in_the_order_typed() {
    staged(allow_and_deny_rules_decide_in_the_order_typed, |world| {
        let allowed = http(world.internet(), "203.0.113.10:80");
        let other = http(world.internet(), "203.0.113.10:8080");
        let third = http(world.internet(), "198.51.100.7:80");
        let flags = [
            "--allow",
            "tcp 203.0.113.10:80",
            "--deny",
            "any 203.0.113.0/24",
            "--allow",
            "tcp 0.0.0.0/0:80",
        ];
        let ended = world.script(
            &flags,
            "for u in 203.0.113.10 203.0.113.10:8080 198.51.100.7; do curl -sS -o /dev/null http://$u/; echo $?; done",
        );
        assert_eq!(ended.stdout, "0\n7\n0\n", "{ended:?}");
        assert_eq!(
            (allowed.connections(), other.connections(), third.connections()),
            (1, 0, 1)
        );
        // Any --allow makes the default deny.
        let ended = world
            .run(
                &["--allow", "tcp 203.0.113.10:80"],
                &["curl", "-sS", "http://198.51.100.7/"],
            )
            .wait();
        assert_eq!(ended.code, REFUSED, "{ended:?}");
        assert!(ended.took < Duration::from_secs(10), "refused at once: {ended:?}");
        assert_eq!(third.connections(), 1);
    });
}

/// The file of the design.
const SAMPLE: &str = r#"defaultAction: deny
rules:
  - action: allow
    cidr: "0.0.0.0/0"
    ports: [443, 80]
    protocol: tcp
  - action: deny
    cidr: "10.0.0.0/8"
dns:
  defaultAction: deny
  allowedDomains: ["*.github.com", "registry.fedoraproject.org"]
  blockedDomains: ["*.malware.example"]
approvalTimeout: 30
"#;

#[test]
fn policy_file_of_the_design_means_what_it_says() {
    staged(policy_file_of_the_design_means_what_it_says, |world| {
        use vnet_tests::{Answer, Dns};
        let web = http(world.internet(), "203.0.113.10:80");
        let other = http(world.internet(), "203.0.113.10:8080");
        let datagrams = udp_echo(world.internet(), "203.0.113.10:443");
        let dns = Dns::serve(
            world.internet(),
            "203.0.113.10:53",
            &[
                ("api.github.com", Answer::A("203.0.113.10")),
                ("github.com", Answer::A("203.0.113.10")),
                ("x.malware.example", Answer::A("203.0.113.10")),
            ],
        );
        let file = world.file("policy.yaml", SAMPLE);
        let ended = world.script(
            &["--network-policy", file.to_str().unwrap()],
            "curl -sS http://203.0.113.10/; curl -sS http://203.0.113.10:8080/; echo $?; \
             echo x | timeout 2 socat -t1 - udp:203.0.113.10:443; \
             curl -sS http://api.github.com/; for n in github.com x.malware.example other.example; do getent ahostsv4 $n; echo $?; done",
        );
        assert_eq!(
            ended.stdout, "this is 203.0.113.10:80 at /\n7\nthis is 203.0.113.10:80 at /\n2\n2\n2\n",
            "{ended:?}"
        );
        assert_eq!(
            (web.connections(), other.connections(), datagrams.requests()),
            (2, 0, 0)
        );
        let others = dns
            .asked()
            .iter()
            .filter(|q| !q.ends_with(" api.github.com"))
            .count();
        assert_eq!(
            others,
            0,
            "what is denied is not asked upstream: {:?}",
            dns.asked()
        );
        // It is gone with the run: `default` is as it was.
        assert!(!world.vnetctl(&["policy", "show"]).contains("github"));
    });
}

#[test]
fn bad_policy_file_is_refused_with_its_place_and_nothing_is_started() {
    staged(
        bad_policy_file_is_refused_with_its_place_and_nothing_is_started,
        |world| {
            for (text, place) in [
                ("defaultAction: Deny\n", ":1:16"),
                ("rules:\n  - action: block\n", ":2:13"),
                ("rules:\n  - action: allow\n    protocol: TCP\n", ":3:15"),
                ("rules:\n  - action: allow\n    cidr: 10.0.0.0/33\n", ":3:11"),
                ("rules:\n  - action: allow\n    ports: [0]\n", ":3:13"),
                ("rules:\n  - action: allow\n    ports: [65536]\n", ":3:13"),
                ("rules: []\nrulez: []\n", ":2:1"),
                ("rules: []\nrules: []\n", ":2:1"),
                ("# defaultAction: deny\n", ":2:1: the document is empty"),
                (
                    "",
                    ": the document is empty (expected at least defaultAction: deny)",
                ),
                (
                    " \n\n",
                    ": the document is empty (expected at least defaultAction: deny)",
                ),
            ] {
                let file = world.file("bad.yaml", text);
                let run = world
                    .run(
                        &["--network-policy", file.to_str().unwrap()],
                        &["touch", "started"],
                    )
                    .wait();
                assert_eq!(run.code, 125, "{text}: {run:?}");
                assert!(
                    run.stderr.contains(&format!("bad.yaml{place}")),
                    "{text}: {run:?}"
                );
                let check = world.try_vnetctl(&["policy", "check", "bad.yaml"]);
                assert_eq!(check.code, 1, "{check:?}");
                assert!(check.stderr.contains(&format!("bad.yaml{place}")), "{check:?}");
                // Whatever reads policies refuses the same.
                for words in [
                    &["policy", "test", "bad.yaml"][..],
                    &["policy", "apply", "bad.yaml"],
                    &[
                        "up",
                        "--listen-qemu",
                        "unix:///nonexistent/vm.sock",
                        "--network-policy",
                        "bad.yaml",
                    ],
                ] {
                    let refused = world.try_vnetctl(words);
                    assert_ne!(refused.code, 0, "{words:?}: {refused:?}");
                    assert!(
                        refused.stderr.contains(&format!("bad.yaml{place}")),
                        "{words:?}: {refused:?}"
                    );
                }
            }
            for (policy, named) in [("/dev/null", "/dev/null"), ("-", "standard input")] {
                // Standard input is /dev/null here.
                let run = world
                    .run(&["--network-policy", policy], &["touch", "started"])
                    .wait();
                assert_eq!(run.code, 125, "{policy}: {run:?}");
                let said = format!("{named}: the document is empty");
                assert!(run.stderr.contains(&said), "{policy}: {run:?}");
            }
            assert!(!world.work().join("started").exists());
            assert_eq!(descendants(), [], "not even a controlplane");
        },
    );
}

#[test]
fn mode_block_closes_everything_and_mode_observe_records_what_would_be_denied() {
    staged(
        mode_block_closes_everything_and_mode_observe_records_what_would_be_denied,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let ended = world
                .run(
                    &["--mode", "block", "--allow", "any 0.0.0.0/0"],
                    &["curl", "-sS", SERVER],
                )
                .wait();
            assert_eq!(ended.code, REFUSED, "{ended:?}");
            assert_eq!(server.connections(), 0);
            let flags = [
                "--mode",
                "observe",
                "--allow",
                "tcp 192.0.2.1:1",
                "--deny",
                "tcp 203.0.113.10:8080",
                "--vm",
                "seen",
            ];
            let ended = world.script(
                &flags,
                "curl -sS http://203.0.113.10/; curl -sS http://203.0.113.10:8080/; echo $?",
            );
            assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n7\n", "{ended:?}");
            let events = world.list(&["events", "list", "--vm", "seen", "--kind", "flow-opened"]);
            assert_eq!(events.len(), 1, "{events:?}");
            assert_eq!(events[0]["wouldDeny"], true, "{events:?}");
            let events = world.list(&["events", "list", "--vm", "seen", "--kind", "flow-denied"]);
            assert_eq!(events.len(), 1, "{events:?}");
        },
    );
}

#[test]
fn mode_enforce_refuses_at_once_what_a_file_would_ask_about() {
    staged(
        mode_enforce_refuses_at_once_what_a_file_would_ask_about,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let other = http(world.internet(), "203.0.113.10:8080");
            let document =
                "version: 1\nmode: ask\nrules:\n  - {action: allow, cidr: 203.0.113.10/32, ports: [80]}\n";
            let file = world.file("asks.yaml", document);
            let flags = ["--mode", "enforce", "--vm", "web", "--network-policy"];
            let ended = world.script(
                &[&flags[..], &[file.to_str().unwrap()]].concat(),
                "curl -sS http://203.0.113.10/; curl -sS http://203.0.113.10:8080/; echo $?",
            );
            assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /\n7\n", "{ended:?}");
            assert_eq!((server.connections(), other.connections()), (1, 0));
            let asked = world.list(&["events", "list", "--vm", "web", "--kind", "pending-opened"]);
            assert!(asked.is_empty(), "{asked:?}");
            let denied = world.list(&["events", "list", "--vm", "web", "--kind", "flow-denied"]);
            assert_eq!(denied.len(), 1, "{denied:?}");
        },
    );
}

#[test]
fn dns_flag_names_the_resolver_that_is_asked_instead_of_the_hosts() {
    staged(
        dns_flag_names_the_resolver_that_is_asked_instead_of_the_hosts,
        |world| {
            use vnet_tests::{Answer, Dns};
            let serve = |at: &str, address: &'static str| {
                Dns::serve(world.internet(), at, &[("web.example.com", Answer::A(address))])
            };
            let hosts = serve("203.0.113.10:53", "192.0.2.1");
            for at in ["198.51.100.7:53", "198.51.100.7:5300"] {
                let named = serve(at, "192.0.2.2");
                let flag = at.trim_end_matches(":53");
                let ended = world
                    .run(&["--dns", flag], &["dig", "+short", "web.example.com"])
                    .wait();
                assert_eq!(ended.stdout, "192.0.2.2\n", "{flag}: {ended:?}");
                assert_eq!(named.asked_for("web.example.com"), 1, "{flag}");
                assert_eq!(hosts.asked(), Vec::<String>::new(), "{flag}");
            }
        },
    );
}

#[test]
fn names_and_labels_come_from_the_flags() {
    staged(names_and_labels_come_from_the_flags, |world| {
        let flags = [
            "--vm",
            "build",
            "--label",
            "team=net",
            "--label",
            "env=test",
            "--secure-mode",
        ];
        let mut run = world.run(
            &flags,
            &["sh", "-c", "hostname evil 2>/dev/null; echo up; exec sleep 60"],
        );
        run.prints("up");
        let vms = world.list(&["vm", "list", "-l", "team=net"]);
        assert_eq!(vms.len(), 1, "{vms:?}");
        assert_eq!(vms[0]["name"], "build");
        assert_eq!(vms[0]["labels"]["env"], "test");
        assert_eq!(vms[0]["mode"], "MODE_ASK");
        eventually("its address is known", || {
            world.json(&["vm", "show", "build"])["addresses"][0] == "192.168.127.2"
        });
        assert_eq!(world.list(&["vm", "list", "-l", "team=other"]).len(), 0);
        // The name is taken, so another run of it has another.
        let mut second = world.run(&["--vm", "build"], &["sh", "-c", "echo up; exec sleep 60"]);
        second.prints("up");
        assert!(
            second
                .stderr()
                .contains("vnet: build is taken; this run's VM is build-2"),
            "{}",
            second.stderr()
        );
        run.signal(Signal::SIGTERM);
        assert_eq!(run.wait().code, 143);
        second.signal(Signal::SIGTERM);
        assert_eq!(second.wait().code, 143);
        world.is_clean();
    });
}

#[test]
fn default_name_is_the_directorys_and_the_same_tomorrow() {
    staged(default_name_is_the_directorys_and_the_same_tomorrow, |world| {
        let name = |world: &World| {
            let mut run = world.run(&[], &["sh", "-c", "echo up; exec sleep 60"]);
            run.prints("up");
            let vms = world.list(&["vm", "list"]);
            run.signal(Signal::SIGKILL);
            run.wait();
            eventually("the VM is gone", || {
                world
                    .list(&["vm", "list"])
                    .iter()
                    .all(|vm| vm["state"] != "VM_STATE_ATTACHED")
            });
            vms[0]["name"].as_str().unwrap().to_owned()
        };
        let first = name(world);
        assert!(first.starts_with("work-"), "{first}");
        assert_eq!(name(world), first);
    });
}

#[test]
fn published_port_leads_to_the_command_and_ends_with_it() {
    staged(published_port_leads_to_the_command_and_ends_with_it, |world| {
        let mut run = world.run(
            &["--secure-mode", "-p", "127.0.0.1:8088:80"],
            &[
                "sh",
                "-c",
                "echo up; exec socat tcp-listen:80,fork,reuseaddr 'system:echo from the guest'",
            ],
        );
        run.prints("up");
        let fetch = || {
            let mut command = world.program("socat");
            command.args(["-T2", "-", "tcp:127.0.0.1:8088"]);
            Running::start(command).wait()
        };
        eventually("the guest listens", || fetch().stdout == "from the guest\n");
        run.signal(Signal::SIGTERM);
        run.wait();
        world.is_clean();
        assert_ne!(fetch().code, 0, "the port is closed again");
    });
}

/// A run that holds a request, and has a process that would like to outlive it.
fn lively(world: &World) -> Running {
    let mut run = world.run(
        &["--secure-mode"],
        &[
            "sh",
            "-c",
            "setsid sleep 1234.5 & curl -sS http://203.0.113.10/ & echo up; wait",
        ],
    );
    run.prints("up");
    world.first_pending();
    assert!(!world.processes("sleep 1234.5").is_empty());
    run
}

/// Nothing, and no file where it ran either.
fn nothing_is_left(world: &World) {
    world.is_clean();
    let mut files = fs::read_dir(world.work()).unwrap();
    assert!(files.next().is_none(), "{:?}", world.work());
}

#[test]
fn nothing_is_left_of_a_run_that_is_killed() {
    staged(nothing_is_left_of_a_run_that_is_killed, |world| {
        let run = lively(world);
        run.signal(Signal::SIGKILL);
        assert_eq!(run.wait().code, 137);
        nothing_is_left(world);
        assert!(world.pending().is_empty(), "nobody is asked for it any more");
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
            let run = lively(world);
            run.signal(signal);
            assert_eq!(run.wait().code, 128 + signal as i32);
            nothing_is_left(world);
        }
    });
}

#[test]
fn nothing_is_left_of_a_run_whose_dataplane_is_killed() {
    staged(nothing_is_left_of_a_run_whose_dataplane_is_killed, |world| {
        let run = lively(world);
        for pid in world.processes("__dataplane") {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        let ended = run.wait();
        assert_eq!(ended.code, 125, "{ended:?}");
        assert!(ended.stderr.contains("dataplane"), "{ended:?}");
        nothing_is_left(world);
    });
}

#[test]
fn nothing_is_left_of_a_run_whose_helper_init_or_watch_of_sockets_is_killed() {
    staged(
        nothing_is_left_of_a_run_whose_helper_init_or_watch_of_sockets_is_killed,
        |world| {
            let status = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let is_watch = |pid: &i32| status(pid).starts_with("Name:\tvnet-sockets\n");
            // NSpid: its pid in each PID namespace that it is in.
            let is_init = |pid: &i32| {
                let status = status(pid);
                let mut pids = status.lines().filter(|line| line.starts_with("NSpid:"));
                pids.any(|line| line.ends_with("\t1"))
            };
            let is_helper = |pid: &i32| !is_watch(pid) && !is_init(pid);
            let kinds: [&dyn Fn(&i32) -> bool; 3] = [&is_helper, &is_init, &is_watch];
            for (number, is_meant) in kinds.into_iter().enumerate() {
                let run = lively(world);
                let meant: Vec<i32> = world
                    .processes("__guest")
                    .into_iter()
                    .filter(|pid| is_meant(pid))
                    .collect();
                assert_eq!(meant.len(), 1, "{number}: {:?}", descendants());
                kill(Pid::from_raw(meant[0]), Signal::SIGKILL).unwrap();
                // Without the watch the command goes on, and ends as it is told to.
                if number == 2 {
                    run.signal(Signal::SIGTERM);
                }
                let ended = run.wait();
                let code = if number == 2 { 143 } else { 125 };
                assert_eq!(ended.code, code, "{number}: {ended:?}");
                nothing_is_left(world);
            }
        },
    );
}

#[test]
fn several_runs_share_a_controlplane_that_ends_by_itself() {
    staged(several_runs_share_a_controlplane_that_ends_by_itself, |world| {
        // As `run` starts it, but for less patience.
        let mut command = world.program("vnet-controlplane");
        command.args(["--if-absent", "--idle-exit", "1"]);
        let mut controlplane = Running::start(command);
        eventually("it serves", || world.control_socket().exists());
        let long = ["sh", "-c", "echo up; exec sleep 2.5"];
        let mut runs = [world.run(&["--vm", "a"], &long), world.run(&["--vm", "b"], &long)];
        for run in &mut runs {
            run.prints("up");
        }
        assert_eq!(world.list(&["vm", "list"]).len(), 2);
        assert!(world.processes("__controlplane").is_empty(), "no second one");
        for run in runs {
            assert_eq!(run.wait().code, 0);
        }
        assert!(
            !controlplane.has_ended(),
            "it serves as long as something is attached"
        );
        let ended = controlplane.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(!world.control_socket().exists());
        assert_eq!(descendants(), []);
    });
}

#[test]
fn two_first_runs_at_once_end_with_one_controlplane() {
    staged(two_first_runs_at_once_end_with_one_controlplane, |world| {
        let runs: Vec<_> = (0..4).map(|_| world.run(&[], &["sleep", "0.5"])).collect();
        for run in runs {
            let ended = run.wait();
            assert_eq!(ended.code, 0, "{ended:?}");
        }
        assert_eq!(world.processes("__controlplane").len(), 1);
        world.is_clean();
        world.stop_controlplane();
        assert_eq!(descendants(), []);
        assert!(!world.control_socket().exists());
    });
}

/// A run of somebody else's, which fetches a page once it is told to.
fn bystander(world: &World) -> Running {
    let script = "echo up; until [ -e go ]; do sleep 0.05; done; exec curl -sS http://203.0.113.10/";
    let mut run = world.run(&["--vm", "bystander"], &["sh", "-c", script]);
    run.prints("up");
    run
}

/// It is told to, and still has its network.
fn goes_on(world: &World, bystander: Running) {
    world.file("go", "");
    let ended = bystander.wait();
    assert_eq!(ended.stdout, "up\nthis is 203.0.113.10:80 at /\n", "{ended:?}");
}

#[test]
fn interrupt_at_the_terminal_ends_the_run_and_neither_the_controlplane_nor_another_run() {
    staged(
        interrupt_at_the_terminal_ends_the_run_and_neither_the_controlplane_nor_another_run,
        |world| {
            let _server = http(world.internet(), "203.0.113.10:80");
            // It starts the controlplane that the other uses.
            let mut person =
                Person::start(&world.command(&["run", "--", "sh", "-c", "echo up; exec sleep 60"]));
            person.sees("up\r\n");
            let controlplane = world.processes("__controlplane");
            let other = bystander(world);
            person.types("\x03");
            let (code, screen) = person.leaves();
            assert_eq!(code, Some(130), "{screen}");
            goes_on(world, other);
            assert_eq!(world.processes("__controlplane"), controlplane);
            world.is_clean();
        },
    );
}

#[test]
fn closed_terminal_ends_the_run_and_neither_the_controlplane_nor_another_run() {
    staged(
        closed_terminal_ends_the_run_and_neither_the_controlplane_nor_another_run,
        |world| {
            let _server = http(world.internet(), "203.0.113.10:80");
            let mut person =
                Person::start(&world.command(&["run", "--", "sh", "-c", "echo up; exec sleep 60"]));
            person.sees("up\r\n");
            let controlplane = world.processes("__controlplane");
            let other = bystander(world);
            person.goes_away();
            goes_on(world, other);
            assert_eq!(world.processes("__controlplane"), controlplane);
            world.is_clean();
        },
    );
}

#[test]
fn interrupt_of_a_command_that_started_the_controlplane_leaves_it_serving() {
    staged(
        interrupt_of_a_command_that_started_the_controlplane_leaves_it_serving,
        |world| {
            let mut person = Person::start(&world.command(&["events", "watch", "--after", "0"]));
            eventually("it starts one", || {
                std::os::unix::net::UnixStream::connect(world.control_socket()).is_ok()
            });
            let controlplane = world.processes("__controlplane");
            assert_eq!(controlplane.len(), 1);
            // It is there, and watches.
            world.vnetctl(&["allow", "tcp", "203.0.113.10:80", "--all-vms"]);
            person.sees("203.0.113.10:80");
            // To the whole foreground group of its terminal.
            person.types("\x03");
            let (code, screen) = person.leaves();
            assert_ne!(code, Some(0), "{screen}");
            assert_eq!(world.list(&["grants", "list"]).len(), 1);
            assert_eq!(world.processes("__controlplane"), controlplane);
        },
    );
}

#[test]
fn question_is_answered_at_the_prompt() {
    staged(question_is_answered_at_the_prompt, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let flags = ["run", "--secure-mode", "--vm", "web", "--", "curl", "-sS", SERVER];
        let mut person = Person::start(&world.command(&flags));
        person.sees("vnet: web asks for tcp 203.0.113.10:80, by curl (pid 2); [y]es");
        person.sees("? ");
        thread::sleep(GRACE + Duration::from_millis(100));
        person.types("y");
        let (code, screen) = person.leaves();
        assert_eq!(code, Some(0), "{screen}");
        assert!(screen.contains("this is 203.0.113.10:80 at /"), "{screen}");
        assert_eq!(server.connections(), 1);

        let mut person = Person::start(&world.command(&flags));
        person.sees("? ");
        thread::sleep(GRACE + Duration::from_millis(100));
        person.types("n");
        let (code, screen) = person.leaves();
        assert_eq!(code, Some(REFUSED), "{screen}");
        assert_eq!(server.connections(), 1);
        world.is_clean();
    });
}

#[test]
fn command_cannot_answer_its_own_question_at_the_prompt() {
    staged(command_cannot_answer_its_own_question_at_the_prompt, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        // Whatever the command writes to its terminal, and pushes into its input (TIOCSTI), is its own.
        let script = "curl -sS http://203.0.113.10/ & sleep 1; for i in 1 2 3 4 5; do echo y; echo y > /dev/tty; sleep 0.2; done; \
                      kill $!; wait $!; echo done";
        let mut person = Person::start(&world.command(&["run", "--secure-mode", "--", "sh", "-c", script]));
        person.sees("asks for");
        let (_, screen) = person.leaves();
        assert!(screen.contains("done"), "{screen}");
        assert_eq!(server.connections(), 0, "{screen}");
    });
}

#[test]
fn command_can_reach_no_controlplane() {
    staged(command_can_reach_no_controlplane, |world| {
        http(world.internet(), "203.0.113.10:80");
        // One socket where it is usually, and one where nothing is hidden.
        let open = world.work().join("open.sock");
        let usual = format!("unix://{}", world.control_socket().display());
        let also = format!("unix://{}", open.display());
        let mut command = world.program("vnet-controlplane");
        command.args(["--listen", &usual, "--listen", &also]);
        let controlplane = Running::start(command);
        eventually("it serves", || open.exists() && world.control_socket().exists());
        world.vnetctl(&["--server", &also, "vm", "list"]);

        let vnetctl = vnet_tests::binaries::binary("vnetctl");
        let vnetctl = vnetctl.display();
        let script = format!(
            "curl -sS {SERVER} & sleep 0.5; ls -A $XDG_RUNTIME_DIR/vnet $XDG_STATE_HOME/vnet; \
             for s in {usual} {also}; do {vnetctl} --server $s pending list; echo $?; {vnetctl} --server $s allow any 0.0.0.0/0 --all-vms; echo $?; done; \
             curl -sS --unix-socket {} http://x/; echo $?; {vnetctl} pending list; echo $?; kill %1; exit 0",
            world.control_socket().display(),
        );
        // The second is opened to the command, and still tells it from its user.
        let ended = world.script(&["--secure-mode", "--socket", open.to_str().unwrap()], &script);
        let codes: Vec<&str> = ended
            .stdout
            .lines()
            .filter(|line| line.parse::<u8>().is_ok())
            .collect();
        assert_eq!(codes.len(), 6, "{ended:?}");
        assert!(codes.iter().all(|code| *code != "0"), "{ended:?}");
        assert!(
            !ended.stdout.contains("control.sock") && !ended.stdout.contains("state.db"),
            "{ended:?}"
        );
        assert!(world.list(&["grants", "list"]).is_empty());
        assert!(
            controlplane.stderr().contains("another network namespace"),
            "{}",
            controlplane.stderr()
        );
        drop(controlplane);
    });
}

#[test]
fn sockets_of_the_system_cannot_be_reached() {
    staged(sockets_of_the_system_cannot_be_reached, |world| {
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), flags, None::<&str>)
            .expect("a stage may mount");
        let paths = [
            "/run/systemd/resolve/io.systemd.Resolve",
            "/run/dbus/system_bus_socket",
            "/run/nscd/socket",
            "/run/docker.sock",
            "/run/podman/podman.sock",
            "/run/containerd/containerd.sock",
        ];
        let _listeners: Vec<UnixListener> = paths
            .iter()
            .map(|path| {
                fs::create_dir_all(std::path::Path::new(path).parent().unwrap()).unwrap();
                UnixListener::bind(path).unwrap()
            })
            .collect();
        let script: String = paths
            .iter()
            .map(|path| format!("curl -s --max-time 1 --unix-socket {path} http://x/; echo $?;"))
            .collect();
        let ended = world.script(&[], &script);
        assert_eq!(ended.stdout, "7\n".repeat(paths.len()), "{ended:?}");
    });
}

#[test]
fn without_a_tun_device_a_veth_pair_does() {
    staged(without_a_tun_device_a_veth_pair_does, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let mut command = world.program("sh");
        command
            .args(["-c", "mount --bind /dev/null /dev/net/tun && exec \"$0\" \"$@\""])
            .arg(vnet_tests::binaries::binary("vnetctl"))
            .args(["run", "--allow", "tcp 203.0.113.10:80", "--", "sh", "-c"])
            .arg("curl -sS http://203.0.113.10/bytes/3000000 | wc -c");
        // The mask is to end with it.
        let mut apart = world.program("unshare");
        apart
            .arg("--mount")
            .arg(command.get_program())
            .args(command.get_args());
        let ended = Running::start(apart).wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.stdout.ends_with("3000000\n"), "{ended:?}");
        assert_eq!(server.requests(), 1);
        world.is_clean();
    });
}

#[test]
fn namespaces_that_are_refused_are_named_with_the_remedy_and_nothing_is_left() {
    staged(
        namespaces_that_are_refused_are_named_with_the_remedy_and_nothing_is_left,
        |world| {
            let vnetctl = vnet_tests::binaries::binary("vnetctl");
            // Root that has its capabilities needs no user namespace.
            let powerless = "setpriv --bounding-set=-all --inh-caps=-all";
            for (limit, as_whom, failed) in [
                // A user namespace can be made, and lets nothing be made in it: only the effect tells.
                ("max_net_namespaces", "", "make a network namespace"),
                ("max_mnt_namespaces", "", "make a mount namespace"),
                ("max_pid_namespaces", "", "make a PID namespace"),
                ("max_user_namespaces", powerless, "make a user namespace"),
            ] {
                let path = format!("/proc/sys/user/{limit}");
                let before = fs::read_to_string(&path).unwrap();
                fs::write(&path, "0").expect("a stage has limits of its own");
                let mut command = world.program("sh");
                command.args(["-c", &format!("exec {as_whom} \"$0\" run -- touch started")]);
                command.arg(&vnetctl);
                let ended = Running::start(command).wait();
                fs::write(&path, before).unwrap();
                assert_eq!(ended.code, 125, "{limit}: {ended:?}");
                for part in [failed, &format!("sudo sysctl -w user.{limit}=15000")] {
                    assert!(ended.stderr.contains(part), "{limit}: no {part:?} in {ended:?}");
                }
                assert!(!world.work().join("started").exists(), "{limit}");
                world.is_clean();
            }
        },
    );
}

#[test]
fn ordinary_user_needs_nobodys_permission() {
    if !as_ordinary_user(&ordinary_user_needs_nobodys_permission) {
        return;
    }
    // First on the machine as it is, where the server is this host's own; then on a stage.
    if !vnetctl::sandbox::stage::inside() {
        let world = World::unstaged();
        let server = vnet_tests::servers::http_here("127.0.0.1:0");
        let port = server.address().port();
        let run = world.run(
            &["--secure-mode", "--vm", "mine"],
            &["curl", "-sS", &format!("http://192.168.127.254:{port}/")],
        );
        let request = world.first_pending();
        world.vnetctl(&["approve", &vnet_tests::id(&request)]);
        let ended = run.wait();
        assert_eq!((ended.code, server.requests()), (0, 1), "{ended:?}");
        world.stop_controlplane();
    }
    staged(ordinary_user_needs_nobodys_permission, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let run = world.run(&["--secure-mode"], &["curl", "-sS", SERVER]);
        world.vnetctl(&["approve", &world.first_pending_id()]);
        let ended = run.wait_for(PATIENCE);
        assert_eq!((ended.code, server.connections()), (0, 1), "{ended:?}");
        world.is_clean();
    });
}

#[test]
fn a_relay_of_the_commands_own_and_proxy_variables_open_nothing() {
    staged(
        a_relay_of_the_commands_own_and_proxy_variables_open_nothing,
        |world| {
            http(world.internet(), "203.0.113.10:80");
            let closed = http(world.internet(), "198.51.100.7:80");
            let ended = world.script(
            &["--vm", "web", "--allow", "tcp 203.0.113.10:80"],
            "socat tcp-listen:3128,bind=127.0.0.1,fork,reuseaddr tcp:198.51.100.7:80 2>&- & \
             socat tcp-listen:3129,bind=127.0.0.1,fork,reuseaddr tcp:203.0.113.10:80 2>&- & \
             until socat -u /dev/null tcp:127.0.0.1:3128 && socat -u /dev/null tcp:127.0.0.1:3129; do sleep 0.05; done 2>&-; \
             for proxy in '' http://127.0.0.1:3128; do \
               http_proxy=$proxy all_proxy=$proxy curl -sS -o page http://198.51.100.7/; echo $?; \
             done; \
             curl -sS -o page http://127.0.0.1:3128/; echo $?; \
             no_proxy='*' curl -sS http://203.0.113.10/; \
             env -u http_proxy -u https_proxy -u all_proxy curl -sS http://203.0.113.10/; \
             http_proxy=http://127.0.0.1:3129 curl -sS http://203.0.113.10/ | cut -d' ' -f 1-3; \
             kill %1 %2",
        );
            let page = "this is 203.0.113.10:80";
            let codes = "7\n52\n52\n";
            assert_eq!(
                ended.stdout,
                format!("{codes}{page} at /\n{page} at /\n{page}\n"),
                "{ended:?}"
            );
            assert_eq!(closed.connections(), 0);
            let denied = world.list(&["events", "list", "--vm", "web", "--kind", "flow-denied"]);
            assert!(
                denied.iter().any(|e| e["text"]
                    .as_str()
                    .is_some_and(|text| text.contains("198.51.100.7:80"))),
                "{denied:?}"
            );
        },
    );
}
