//! What outlives which daemon: transfers, questions and answers over a restart of the controlplane, and
//! what a guest sees of a daemon that is killed.
#![cfg(target_os = "linux")]

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vnet_tests::{Controlplane, Running, World, binaries, eventually, http, misses, staged, tcp};

#[test]
fn a_transfer_outlives_a_restart_of_the_controlplane() {
    staged(a_transfer_outlives_a_restart_of_the_controlplane, |world| {
        let server = slow_server(world);
        for (before, ends_by) in [Signal::SIGTERM, Signal::SIGKILL].into_iter().enumerate() {
            let controlplane = Controlplane::start(world, ends_by);
            let run = world.run(
                &["--allow", "tcp 203.0.113.10:8000"],
                &["sh", "-c", "curl -sS http://203.0.113.10:8000/ | wc -c"],
            );
            eventually("the transfer has begun", || server.connections() == before + 1);
            let again = controlplane.restart(world);
            let ended = run.wait();
            assert_eq!((ended.code, ended.stdout.trim()), (0, "2000000"), "{ended:?}");
            assert_eq!(server.connections(), before + 1, "the same connection");
            again.end();
        }
    });
}

#[test]
fn a_question_is_asked_once_and_answered_after_a_restart() {
    staged(a_question_is_asked_once_and_answered_after_a_restart, |world| {
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        let server = http(world.internet(), "203.0.113.10:80");
        let run = world.run(
            &["--secure-mode"],
            &["curl", "-sS", "--retry", "0", "http://203.0.113.10/kept"],
        );
        let before = world.first_pending_id();
        let _again = controlplane.restart(world);
        // The dataplane says again what it holds; an answer to it completes the attempt that began before.
        let after = world.first_pending_id();
        assert_eq!(world.pending().len(), 1, "before {before}, after {after}");
        world.vnetctl(&["approve", &after]);
        let ended = run.wait();
        assert_eq!(ended.stdout, "this is 203.0.113.10:80 at /kept\n", "{ended:?}");
        assert_eq!(server.connections(), 1, "the same attempt");
    });
}

#[test]
fn nothing_opens_while_the_controlplane_is_away() {
    staged(nothing_opens_while_the_controlplane_is_away, |world| {
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        let server = http(world.internet(), "203.0.113.10:80");
        // By hand: a `run` starts a controlplane where there is none.
        let (_dataplane, socket) = by_hand(world, &controlplane, "web");
        let mut guest = world.program(binaries::binary("vnet-load"));
        guest.args(["guest", "--socket", &socket, "--", "sh", "-c"]).arg(
            "echo there; until [ -e go ]; do sleep 0.05; done
             curl -sS --max-time 3 http://203.0.113.10/; echo $?
             until [ -e again ]; do sleep 0.05; done; curl -sS --max-time 20 http://203.0.113.10/; echo $?",
        );
        let mut run = Running::start(guest);
        run.prints("there");
        eventually("the VM is listed", || !world.list(&["vm", "list"]).is_empty());
        world.vnetctl(&["allow", "tcp", "203.0.113.10:80", "--vm", "web"]);
        controlplane.end();
        world.file("go", "");
        run.prints("28\n");
        assert_eq!(
            server.connections(),
            0,
            "what a grant allows is not known without the controlplane"
        );
        let _again = Controlplane::start(world, Signal::SIGKILL);
        world.file("again", "");
        let ended = run.wait();
        assert!(ended.stdout.ends_with("at /\n0\n"), "{ended:?}");
        // What was held is decided too when it is back, though nobody waits for it any more.
        assert_eq!(server.requests(), 1);
    });
}

#[test]
fn an_answer_for_ever_survives_kill_9() {
    staged(an_answer_for_ever_survives_kill_9, |world| {
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        let server = http(world.internet(), "203.0.113.10:80");
        let flags = ["--secure-mode", "--vm", "web"];
        let fetch = ["curl", "-sS", "http://203.0.113.10/"];
        let run = world.run(&flags, &fetch);
        let id = world.first_pending_id();
        world.vnetctl(&["approve", &id, "--forever"]);
        // Killed at once: what was answered has been written.
        let _again = controlplane.restart(world);
        assert_eq!(run.wait().code, 0);
        let grants = world.list(&["grants", "list"]);
        assert_eq!(grants.len(), 1, "{grants:?}");
        let ended = world.run(&flags, &fetch).wait();
        assert_eq!(ended.code, 0, "not asked again: {ended:?}");
        assert_eq!((server.connections(), world.pending().len()), (2, 0));
    });
}

#[test]
fn t63_kill_9_leaves_a_mark_in_the_history_and_an_end_in_order_none() {
    staged(
        t63_kill_9_leaves_a_mark_in_the_history_and_an_end_in_order_none,
        |world| {
            let cut_off = || {
                let events = world.list(&["events", "list", "--limit", "1000"]);
                let cut = events
                    .into_iter()
                    .filter(|e| e["kind"] == "EVENT_KIND_HISTORY_CUT_OFF");
                cut.count()
            };
            let first = Controlplane::start(world, Signal::SIGTERM);
            let second = first.restart(world);
            assert_eq!(cut_off(), 0, "ended in order");
            second.end();
            let killed = Controlplane::start(world, Signal::SIGKILL);
            let before = world.list(&["events", "list"]);
            let _again = killed.restart(world);
            assert_eq!(cut_off(), 1);
            // A watch that is resumed from before the kill is told of it rather than of a number of missing events.
            let numbers = before
                .iter()
                .filter_map(|e| e["sequence"].as_str()?.parse::<u64>().ok());
            let after = numbers.max().unwrap_or(0).to_string();
            let mut watch = world.program("vnetctl");
            watch.args(["events", "watch", "--after", &after, "-o", "json"]);
            let watch = Running::start(watch);
            eventually("the mark is told", || watch.stdout().contains("HISTORY_CUT_OFF"));
            assert!(!watch.stdout().contains("GAP"), "{}", watch.stdout());
        },
    );
}

const SHUT: &str = "version: 1\nrules:\n  - {name: shut, action: deny}\n";
const WEB: &str = "version: 1\nrules:\n  - {name: web, action: allow, cidr: 203.0.113.10/32, ports: [80]}\n";

#[test]
fn an_unconfirmed_policy_goes_at_its_deadline_over_kill_9() {
    staged(an_unconfirmed_policy_goes_at_its_deadline_over_kill_9, |world| {
        let controlplane = Controlplane::start(world, Signal::SIGKILL);
        let _server = http(world.internet(), "203.0.113.10:80");
        let (shut, web) = (world.file("shut.yaml", SHUT), world.file("web.yaml", WEB));
        world.vnetctl(&["policy", "apply", shut.to_str().unwrap()]);
        let applied = world.vnetctl(&["policy", "apply", web.to_str().unwrap(), "--confirm-within", "8s"]);
        assert!(
            applied.contains("it goes in 8s unless this comes: vnetctl policy confirm"),
            "{applied}"
        );
        let mut run = world.run(&["--vm", "web"], &["curl", "-sSN", "http://203.0.113.10/drip"]);
        run.prints("...");
        let _again = controlplane.restart(world);
        let shown = world.json(&["policy", "show"]);
        assert_eq!(shown["revision"], "2", "its time is still to come: {shown}");
        let ended = run.wait();
        assert_ne!(ended.code, 0, "what it let through is cut: {ended:?}");
        let shown = world.json(&["policy", "show"]);
        assert_eq!(
            (&shown["revision"], &shown["document"]),
            (&"3".into(), &SHUT.into()),
            "{shown}"
        );
        assert_eq!(shown["appliedBy"], "vnet");
        let late = world.try_vnetctl(&["policy", "confirm"]);
        assert!(
            late.code == 1 && late.stderr.contains("awaits no confirmation"),
            "{late:?}"
        );
        let refused = world
            .run(&["--vm", "web"], &["curl", "-sS", "http://203.0.113.10/"])
            .wait();
        assert_eq!(refused.code, 7, "{refused:?}");
    });
}

#[test]
fn a_scan_of_what_one_verdict_opened_asks_nothing_more() {
    staged(a_scan_of_what_one_verdict_opened_asks_nothing_more, |world| {
        let controlplane = Controlplane::start_logging(world, Signal::SIGTERM);
        let server = http(world.internet(), "198.51.100.7:80");
        let file = world.file(
            "wide.yaml",
            "version: 1\nmode: enforce\nrules:\n  - {action: allow, cidr: 198.51.0.0/16, ports: [80], protocol: tcp}\n",
        );
        let load = binaries::binary("vnet-load");
        // Four thousand of its addresses, most of which nobody has; what is fetched last comes behind them all.
        let scan = format!(
            "curl -sS http://198.51.100.7/ && {} knock --to 198.51.0.1 --addresses 4000 --port 80 --ports 1 \
             --count 4000 -- curl -sS http://198.51.100.7/",
            load.display()
        );
        let ended = world.script(
            &["--network-policy", file.to_str().unwrap(), "--vm", "web"],
            &scan,
        );
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(server.requests(), 2);
        assert_eq!(misses(&controlplane.end()), 1);
    });
}

#[test]
fn a_killed_dataplane_ends_the_run_and_leaves_nothing() {
    staged(a_killed_dataplane_ends_the_run_and_leaves_nothing, |world| {
        let _server = slow_server(world);
        let mut run = world.run(
            &["--vm", "web", "--allow", "tcp 203.0.113.10:8000"],
            &[
                "sh",
                "-c",
                "echo begun; curl -sS http://203.0.113.10:8000/ >/dev/null; sleep 60",
            ],
        );
        run.prints("begun");
        let dataplanes = world.processes("__dataplane");
        assert!(!dataplanes.is_empty());
        for pid in dataplanes {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        let ended = run.wait();
        assert_eq!(ended.code, 125, "{ended:?}");
        world.is_clean();
        is_listed_as(world, "VM_STATE_LOST");
    });
}

#[test]
fn a_vm_whose_dataplane_is_killed_is_lost_and_served_again_under_its_name() {
    staged(
        a_vm_whose_dataplane_is_killed_is_lost_and_served_again_under_its_name,
        |world| {
            let controlplane = Controlplane::start(world, Signal::SIGTERM);
            let server = http(world.internet(), "203.0.113.10:80");
            world.vnetctl(&["allow", "tcp", "203.0.113.10:80", "--vm", "web"]);
            let (dataplane, socket) = by_hand(world, &controlplane, "web");
            let guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
            dataplane.signal(Signal::SIGKILL);
            is_listed_as(world, "VM_STATE_LOST");
            drop((guest, dataplane));
            // As the one before left it: its socket is still there.
            let (_again, socket) = by_hand(world, &controlplane, "web");
            let _guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
            assert_eq!(server.requests(), 2, "what was allowed to the VM still is");
        },
    );
}

#[test]
fn a_name_is_kept_over_kill_9_for_who_lives_on_and_not_for_who_was_killed_too() {
    staged(
        a_name_is_kept_over_kill_9_for_who_lives_on_and_not_for_who_was_killed_too,
        |world| {
            let controlplane = Controlplane::start(world, Signal::SIGKILL);
            let server = http(world.internet(), "203.0.113.10:80");
            world.vnetctl(&["allow", "tcp", "203.0.113.10:80", "--vm", "web"]);
            let (dataplane, socket) = by_hand(world, &controlplane, "web");
            let guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
            // It cannot be the first to come back.
            dataplane.signal(Signal::SIGSTOP);
            let controlplane = controlplane.restart(world);
            let (other, other_socket) = by_hand_as(world, &controlplane, "other", "web");
            let mut stranger = world.load();
            stranger.args(["guest", "--socket", &other_socket, "--", "sleep", "60"]);
            let stranger = Running::start(stranger);
            let names = || -> Vec<String> {
                let listed = world.list(&["vm", "list"]);
                let attached = listed.iter().filter(|vm| vm["state"] == "VM_STATE_ATTACHED");
                attached
                    .map(|vm| format!("{} {}", vm["name"], vm["network"]))
                    .collect()
            };
            eventually("another asks for the name", || !names().is_empty());
            assert!(names()[0].starts_with("\"web-2\""), "{:?}", names());
            dataplane.signal(Signal::SIGCONT);
            eventually("it has its name again", || names().len() == 2);
            assert!(names()[0].starts_with("\"web\""), "{:?}", names());

            for killed in [&dataplane, &other] {
                killed.signal(Signal::SIGKILL);
            }
            let controlplane = controlplane.restart(world);
            drop((dataplane, guest, other, stranger));
            let (_again, socket) = by_hand(world, &controlplane, "web");
            let _guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
            assert_eq!(server.requests(), 2, "what was allowed to the VM still is");
        },
    );
}

#[test]
fn up_whose_dataplane_is_killed_ends_and_its_vm_is_served_again_under_its_name() {
    staged(
        up_whose_dataplane_is_killed_ends_and_its_vm_is_served_again_under_its_name,
        |world| {
            let _server = http(world.internet(), "203.0.113.10:80");
            let flags = ["--allow", "tcp 203.0.113.10:80"];
            let (up, socket) = world.up(&flags);
            let guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
            for pid in world.processes("__dataplane") {
                kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            }
            let ended = up.wait();
            assert_eq!(ended.code, 1, "{ended:?}");
            assert!(ended.stderr.contains("dataplane"), "{ended:?}");
            is_listed_as(world, "VM_STATE_LOST");
            drop(guest);
            let (_again, socket) = world.up(&flags);
            let _guest = fetch_and_stay(world, &socket);
            is_listed_as(world, "VM_STATE_ATTACHED");
        },
    );
}

/// Waits until one VM is listed, `web`, in this state.
fn is_listed_as(world: &World, state: &str) {
    let mut listed = Vec::new();
    eventually(state, || {
        listed = world.list(&["vm", "list"]);
        listed.iter().any(|vm| vm["state"] == state)
    });
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0]["name"], "web", "{listed:?}");
}

/// A guest behind a socket that fetches a page and stays.
fn fetch_and_stay(world: &World, socket: &str) -> Running {
    let mut guest = world.load();
    guest.args(["guest", "--socket", socket, "--", "sh", "-c"]);
    guest.arg("curl -sS --max-time 20 http://203.0.113.10/; sleep 60");
    let mut guest = Running::start(guest);
    guest.prints("this is 203.0.113.10:80 at /\n");
    guest
}

/// A dataplane that is started by hand, of this name, as is its VM; and the socket for guests.
fn by_hand(world: &World, controlplane: &Controlplane, name: &str) -> (Running, String) {
    by_hand_as(world, controlplane, name, name)
}

/// The same, with a VM of another name.
fn by_hand_as(world: &World, controlplane: &Controlplane, name: &str, vm: &str) -> (Running, String) {
    let socket = world
        .runtime_dir()
        .join(format!("{name}.sock"))
        .display()
        .to_string();
    let mut command = world.program("vnet-dataplane");
    command.args(["--controlplane", controlplane.session_url()]);
    command.args(["--vm", vm, "--name", name]);
    command.args(["--listen-qemu", &format!("unix://{socket}")]);
    (Running::start(command), socket)
}

#[test]
fn several_dataplanes_share_one_controlplane() {
    staged(several_dataplanes_share_one_controlplane, |world| {
        let controlplane = Controlplane::start(world, Signal::SIGTERM);
        let _server = http(world.internet(), "203.0.113.10:80");
        let dataplanes: Vec<(Running, String)> = ["red", "blue"]
            .into_iter()
            .map(|name| by_hand(world, &controlplane, name))
            .collect();
        let fetch = |socket: &str| {
            let mut guest = world.program(binaries::binary("vnet-load"));
            guest.args([
                "guest",
                "--socket",
                socket,
                "--",
                "curl",
                "-sS",
                "--max-time",
                "20",
            ]);
            guest.arg("http://203.0.113.10/");
            Running::start(guest)
        };
        let guests: Vec<Running> = dataplanes.iter().map(|(_, socket)| fetch(socket)).collect();
        eventually("both ask", || world.pending().len() == 2);
        for (vm, fetched) in [("red", 0), ("blue", 7)] {
            let pending = world.pending();
            let item = pending.iter().find(|item| item["vm"] == vm).unwrap();
            let answer = if fetched == 0 { "approve" } else { "deny" };
            world.vnetctl(&[answer, item["id"].as_str().unwrap()]);
        }
        let codes: Vec<i32> = guests.into_iter().map(|guest| guest.wait().code).collect();
        assert_eq!(codes, [0, 7], "each has an answer of its own");
    });
}

/// Two million bytes in two seconds.
fn slow_server(world: &World) -> vnet_tests::Server {
    tcp(world.internet(), "203.0.113.10:8000", |mut stream, _| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 2000000\r\n\r\n");
        for _ in 0..40 {
            if stream.write_all(&[b'x'; 50_000]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
    })
}
