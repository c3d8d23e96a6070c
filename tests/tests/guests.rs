//! Two guests behind one dataplane, each a real Linux stack: what passes between them, and what does not.
#![cfg(target_os = "linux")]

use std::io::{PipeWriter, Write as _};

use nix::sys::signal::Signal;
use serde_json::Value;
use vnet_tests::{Running, World, eventually, staged};

/// What the first guest may open: one port of the second, over TCP and UDP.
const OPENS_7000: &str = "
defaultAction: deny
rules:
  - {name: to-second, action: allow, cidr: 192.168.127.3/32, ports: [7000], protocol: [tcp, udp], vm: {name: web}}
";
/// And echo, instead.
const OPENS_ECHO: &str = "
defaultAction: deny
rules:
  - {name: ping, action: allow, cidr: 192.168.127.3/32, protocol: icmp, vm: {name: web}}
";
const FIRST: &str = "192.168.127.2";
const SECOND: &str = "192.168.127.3";

/// Does in a guest what it is told, a line each, and prints what came of it. Every port in use echoes, over TCP and
/// UDP, and says how its last connection ended.
const AGENT: &str = r#"
import errno, hashlib, socket, subprocess, sys, threading

ends = {}

def name(error):
    return errno.errorcode.get(error.errno, type(error).__name__)

def serve(port):
    t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(('', port)); t.listen()
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', port))
    def echo(c):
        try:
            while data := c.recv(65536): c.sendall(data)
            ends[port] = 'closed'
        except OSError as error: ends[port] = name(error)
        c.close()
    def accept():
        while True: threading.Thread(target=echo, args=(t.accept()[0],), daemon=True).start()
    def answer():
        while True:
            data, peer = u.recvfrom(65536)
            u.sendto(data, peer)
    for work in (accept, answer): threading.Thread(target=work, daemon=True).start()
    return 'serving'

def tcp(address, port, count=1):
    with socket.create_connection((address, port), 20) as s:
        payload = bytes(range(256)) * (count // 256) + b'x' * (count % 256)
        threading.Thread(target=lambda: (s.sendall(payload), s.shutdown(socket.SHUT_WR))).start()
        got = hashlib.sha256()
        while data := s.recv(65536): got.update(data)
        return 'echoed' if got.digest() == hashlib.sha256(payload).digest() else 'garbled'

def udp(address, port, count=1):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.connect((address, port))
    s.send(b'y' * count)
    return 'echoed' if s.recv(65536) == b'y' * count else 'garbled'

def ping(address):
    return 'echoed' if subprocess.run(['ping', '-c', '1', '-W', '2', address], capture_output=True).returncode == 0 else 'silence'

def hold(address, port):
    global held
    held = socket.create_connection((address, port), 20); held.settimeout(20)
    held.sendall(b'z'); held.recv(1)
    return 'held'

def use():
    try:
        held.sendall(b'z')
        return 'echoed' if held.recv(1) else 'closed'
    except OSError as error: return name(error)

def end(port):
    return ends.pop(port, 'none yet')

print('ready', flush=True)
for number, line in enumerate(sys.stdin):
    try: said = eval(line)
    except OSError as error: said = name(error)
    print(f'{number}: {said}', flush=True)
"#;

/// A guest that does what it is told.
struct Guest {
    running: Running,
    tell: PipeWriter,
    told: usize,
}

impl Guest {
    fn start(world: &World, socket: &str, address: &str) -> Guest {
        let agent = world.file("agent.py", AGENT).display().to_string();
        let mut command = world.load();
        let address = format!("{address}/24");
        command.args([
            "guest",
            "--socket",
            socket,
            "--address",
            &address,
            "--",
            "python3",
            &agent,
        ]);
        let (read, tell) = std::io::pipe().expect("there are pipes");
        command.stdin(read);
        let mut running = Running::start_with_input(command);
        running.prints("ready");
        let mut guest = Guest {
            running,
            tell,
            told: 0,
        };
        // Its own ping makes it known.
        eventually("its link is up", || {
            guest.does("ping('192.168.127.1')") == "echoed"
        });
        assert_eq!(guest.does("serve(7000)"), "serving");
        assert_eq!(guest.does("serve(7001)"), "serving");
        guest
    }

    /// Tells it to do something, and does not wait.
    fn begins(&mut self, what: &str) -> usize {
        writeln!(self.tell, "{what}").expect("it listens");
        self.told += 1;
        self.told - 1
    }

    /// What came of what it was told.
    fn says(&mut self, number: usize) -> String {
        let mark = format!("{number}: ");
        let line = |text: String| {
            let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            lines
                .find_map(|line| line.strip_prefix(&mark))
                .map(|said| said.trim_end().to_owned())
        };
        eventually(&format!("it says {number}"), || {
            line(self.running.stdout()).is_some()
        });
        line(self.running.stdout()).expect("it said so")
    }

    fn does(&mut self, what: &str) -> String {
        let number = self.begins(what);
        self.says(number)
    }
}

/// Two guests, `web` and `web-2`, that are under a policy of this text.
fn two_guests(world: &World, flags: &[&str], policy: Option<&str>) -> (Running, Guest, Guest) {
    let (up, socket) = world.up(flags);
    if let Some(policy) = policy {
        apply(world, policy);
    }
    let first = Guest::start(world, &socket, FIRST);
    let second = Guest::start(world, &socket, SECOND);
    (up, first, second)
}

fn apply(world: &World, policy: &str) {
    let file = world.file("policy.yaml", policy);
    world.vnetctl(&["policy", "apply", &file.display().to_string()]);
}

/// The live flows to the second guest over a protocol.
fn flows(world: &World, protocol: &str) -> Vec<Value> {
    let mut flows = world.list(&["flows", "list"]);
    flows.retain(|flow| flow["tuple"]["protocol"] == protocol && flow["peerVm"] == "web-2");
    flows
}

#[test]
fn guests_under_a_policy_are_named_in_turn_and_do_not_reach_each_other() {
    staged(
        guests_under_a_policy_are_named_in_turn_and_do_not_reach_each_other,
        |world| {
            assert!(
                !pings_neighbour(world, &["--allow", "tcp 203.0.113.10:80"]),
                "under a policy"
            );
            assert!(pings_neighbour(world, &[]), "in an open network");
        },
    );
}

#[test]
fn a_rule_that_names_a_guest_opens_to_it_what_it_says_and_nothing_else() {
    staged(
        a_rule_that_names_a_guest_opens_to_it_what_it_says_and_nothing_else,
        |world| {
            let (_up, mut first, mut second) = two_guests(world, &[], Some(OPENS_7000));
            assert_eq!(first.does("tcp('192.168.127.3', 7000, 20_000_000)"), "echoed");
            assert_eq!(first.does("udp('192.168.127.3', 7000, 1400)"), "echoed");
            assert_eq!(
                first.does("udp('192.168.127.3', 7000, 9000)"),
                "echoed",
                "in fragments"
            );
            // Closed: another port, echo, and all that the second begins.
            assert_eq!(first.does("tcp('192.168.127.3', 7001)"), "ECONNREFUSED");
            assert_eq!(first.does("ping('192.168.127.3')"), "silence");
            assert_eq!(second.does("tcp('192.168.127.2', 7000)"), "ECONNREFUSED");
            assert_eq!(second.does("udp('192.168.127.2', 7000)"), "EHOSTUNREACH");
            assert_eq!(second.does("ping('192.168.127.2')"), "silence");

            // One flow, of the guest that opened it, with its bytes both ways.
            let listed = flows(world, "PROTOCOL_UDP");
            assert!(listed.iter().all(|flow| flow["vm"] == "web"), "{listed:?}");
            assert_eq!(first.does("hold('192.168.127.3', 7000)"), "held");
            eventually("the bytes are counted", || {
                flows(world, "PROTOCOL_TCP")
                    .iter()
                    .any(|flow| flow["bytesUp"] == "1" && flow["bytesDown"] == "1")
            });
            let close = |world: &World| {
                for flow in flows(world, "PROTOCOL_TCP") {
                    world.vnetctl(&["flows", "close", flow["id"].as_str().unwrap_or_default()]);
                }
            };
            close(world);
            assert_eq!(first.does("use()"), "ECONNRESET");
            eventually("the second guest sees the cut", || {
                second.does("end(7000)") == "ECONNRESET"
            });
            assert_eq!(
                first.does("tcp('192.168.127.3', 7000)"),
                "echoed",
                "the verdict stays"
            );

            // A change of policy cuts what it no longer allows, and opens what it does.
            assert_eq!(first.does("hold('192.168.127.3', 7000)"), "held");
            assert_eq!(first.does("use()"), "echoed");
            apply(world, OPENS_ECHO);
            assert_eq!(first.does("use()"), "ECONNRESET");
            eventually("the second guest sees it, too", || {
                second.does("end(7000)") == "ECONNRESET"
            });
            assert_eq!(first.does("tcp('192.168.127.3', 7000)"), "ECONNREFUSED");
            assert_eq!(first.does("ping('192.168.127.3')"), "echoed");
            assert_eq!(second.does("ping('192.168.127.2')"), "silence");

            // A guest in quarantine is closed to the others, whatever they may.
            world.vnetctl(&["vm", "mode", "web-2", "quarantine"]);
            assert_eq!(first.does("ping('192.168.127.3')"), "silence");
        },
    );
}

#[test]
fn a_question_about_another_guest_holds_the_connection_until_it_is_answered() {
    staged(
        a_question_about_another_guest_holds_the_connection_until_it_is_answered,
        |world| {
            let (_up, mut first, mut second) = two_guests(world, &["--secure-mode"], None);
            let attempt = first.begins("tcp('192.168.127.3', 7000)");
            let asked = world.first_pending();
            assert_eq!((&asked["vm"], &asked["peerVm"]), (&"web".into(), &"web-2".into()));
            assert_eq!(asked["guards"], serde_json::json!(["GUARD_GUEST"]));
            // What is told apart by address is known once the address was reported.
            eventually("it is explained whose the address is", || {
                let words = ["policy", "explain", "tcp", "192.168.127.3:7000", "--vm", "web"];
                world.json(&words)["peerVm"] == "web-2"
            });
            world.vnetctl(&["approve", asked["id"].as_str().unwrap_or_default()]);
            assert_eq!(first.says(attempt), "echoed", "the same attempt");
            // The answer is the first guest's, to that port.
            let attempt = second.begins("tcp('192.168.127.2', 7000)");
            let asked = world.first_pending();
            assert_eq!((&asked["vm"], &asked["peerVm"]), (&"web-2".into(), &"web".into()));
            world.vnetctl(&["deny", asked["id"].as_str().unwrap_or_default()]);
            assert_eq!(second.says(attempt), "ECONNREFUSED");
            let attempt = first.begins("tcp('192.168.127.3', 7001)");
            let asked = world.first_pending();
            world.vnetctl(&["deny", asked["id"].as_str().unwrap_or_default()]);
            assert_eq!(first.says(attempt), "ECONNREFUSED");
        },
    );
}

#[test]
fn a_guest_that_goes_away_resets_what_was_open_to_it() {
    staged(a_guest_that_goes_away_resets_what_was_open_to_it, |world| {
        let (_up, mut first, second) = two_guests(world, &[], Some(OPENS_7000));
        assert_eq!(first.does("hold('192.168.127.3', 7000)"), "held");
        second.running.signal(Signal::SIGKILL);
        let attempt = first.begins("held.recv(1)");
        assert_eq!(first.says(attempt), "ECONNRESET");
        eventually("its flows are gone", || flows(world, "PROTOCOL_TCP").is_empty());
        assert_eq!(
            first.does("tcp('192.168.127.3', 7000)"),
            "EHOSTUNREACH",
            "nobody is there"
        );
    });
}

/// Puts two guests behind one dataplane, checks their names, and tells whether one reaches the other.
fn pings_neighbour(world: &World, flags: &[&str]) -> bool {
    let (up, socket) = world.up(flags);
    let guest = |address: &str, command: &[&str]| {
        let mut guest = world.load();
        guest
            .args(["guest", "--socket", &socket, "--address", address, "--"])
            .args(command);
        Running::start(guest)
    };
    // Its own ping makes it known.
    let first = guest(
        "192.168.127.2/24",
        &["sh", "-c", "ping -c 1 -W 5 192.168.127.1 && sleep 60"],
    );
    eventually("the first guest is there", || {
        first.stdout().contains("1 received")
    });
    let second = guest(
        "192.168.127.3/24",
        &[
            "sh",
            "-c",
            "ping -c 1 -W 5 192.168.127.1; echo; ping -c 2 -W 3 192.168.127.2",
        ],
    );
    eventually("the second guest is there", || {
        second.stdout().contains("1 received")
    });
    eventually("both are listed under names in turn", || {
        let vms = world.list(&["vm", "list"]);
        let is_there = |name: &str| vms.iter().any(|vm| vm["name"] == name);
        is_there("web") && is_there("web-2")
    });
    let reached = second.wait().stdout.contains("2 received");
    first.signal(Signal::SIGKILL);
    up.signal(Signal::SIGTERM);
    let ended = up.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    reached
}
