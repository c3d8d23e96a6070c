//! Faults of gvproxy's that have no other place: each test is named for the one that vnet does not have. The others are
//! with their topics (`gv_*.rs`); docs/tests.md lists all.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use vnet_tests::{Running, World, eventually, http, staged};

/// An address of the internet's that takes whatever is sent to it and never answers.
const BLACK_HOLE: &str = "203.0.113.99";

fn ip(world: &World, words: &[&str]) {
    let mut command = world.program("ip");
    command.args(words);
    let ended = Running::start(command).wait();
    assert_eq!(ended.code, 0, "ip {words:?}: {ended:?}");
}

/// Makes [`BLACK_HOLE`] one: the link has a neighbour there, whom nobody is.
fn black_hole(world: &World) {
    let neighbour = ["lladdr", "02:00:00:00:00:99", "dev", "host0", "nud", "permanent"];
    ip(
        world,
        &[&["neigh", "replace", BLACK_HOLE], &neighbour[..]].concat(),
    );
}

/// Open descriptors of the dataplane.
fn descriptors(world: &World) -> usize {
    let [pid] = world.processes("__dataplane")[..] else {
        panic!("there is one dataplane");
    };
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

#[test]
fn twelve_black_holed_connects_do_not_delay_a_good_one() {
    staged(twelve_black_holed_connects_do_not_delay_a_good_one, |world| {
        black_hole(world);
        let server = http(world.internet(), "203.0.113.10:80");
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
        let script = format!(
            "for p in $(seq 81 92); do curl -sS -m 20 http://{BLACK_HOLE}:$p/ 2>/dev/null & done; \
             until [ -e go ]; do sleep 0.05; done; curl -sS -m 3 http://203.0.113.10/"
        );
        let running = world.guest_script(&socket, &script);
        let dialling = format!("dst {BLACK_HOLE}");
        eventually("twelve connects wait for an answer", || {
            let mut ss = world.program("ss");
            ss.args(["-Htn", "state", "syn-sent"]).args(dialling.split(' '));
            Running::start(ss).wait().stdout.lines().count() == 12
        });
        world.file("go", "");
        let mut running = running;
        running.prints("this is 203.0.113.10:80 at /");
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn five_thousand_udp_ports_touched_once_stay_bounded() {
    staged(five_thousand_udp_ports_touched_once_stay_bounded, |world| {
        black_hole(world);
        let server = http(world.internet(), "203.0.113.10:80");
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
        let mut running = world.guest_script(
            &socket,
            &format!(
                "for p in $(seq 10001 15000); do echo x > /dev/udp/{BLACK_HOLE}/$p; done; echo sent; \
                 until [ -e go ]; do sleep 0.05; done; curl -sS -m 5 http://203.0.113.10/"
            ),
        );
        running.prints("sent");
        let before_and_other = 200;
        let most = descriptors(world);
        assert!(most > 1_000, "the ports were touched: {most}");
        // Those that made way in a turn of the guest's thread are closed at its end.
        assert!(most <= 2 * 4_096, "{most} descriptors");
        eventually("no more are open than may be", || {
            descriptors(world) <= 4_096 + before_and_other
        });
        world.file("go", "");
        running.prints("this is 203.0.113.10:80 at /");
        assert_eq!(server.connections(), 1);
        // What nobody answers is kept for 30 s.
        let began = std::time::Instant::now();
        while descriptors(world) > before_and_other {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{} are left",
                descriptors(world)
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

#[test]
fn a_host_that_lets_nobody_ping_is_told_of() {
    staged(a_host_that_lets_nobody_ping_is_told_of, |world| {
        // In a network namespace of its own, where nobody may as long as nobody says otherwise.
        let socket = world.runtime_dir().join("vm.sock");
        let url = format!("unix://{}", socket.display());
        let command = world.gvproxy(&["-ssh-port", "-1", "-listen-qemu", &url]);
        let mut apart = world.program("unshare");
        apart
            .arg("-n")
            .arg(command.get_program())
            .args(command.get_args());
        let mut gvproxy = Running::start(apart);
        gvproxy.complains("waiting for clients");
        let ended = world.guest_script(&socket,
            "ping -c 1 -W 5 192.168.127.1 >/dev/null && echo gateway; ping -c 2 -W 1 203.0.113.10 >/dev/null || echo none",
        )
        .wait();
        assert_eq!(ended.stdout, "gateway\nnone\n", "{ended:?}");
        let said = gvproxy.complains("net.ipv4.ping_group_range");
        assert_eq!(
            said.matches("net.ipv4.ping_group_range").count(),
            1,
            "once: {said}"
        );
    });
}

#[test]
fn ready_is_told_when_every_socket_is_there() {
    staged(ready_is_told_when_every_socket_is_there, |world| {
        let [notices, listen, services, qemu] =
            ["n.sock", "l.sock", "s.sock", "q.sock"].map(|name| world.runtime_dir().join(name));
        let listener = std::os::unix::net::UnixListener::bind(&notices).unwrap();
        let url = |path: &Path| format!("unix://{}", path.display());
        let gvproxy = Running::start(world.gvproxy(&[
            "-ssh-port",
            "40222",
            "-notification",
            &url(&notices),
            "-listen",
            &url(&listen),
            "-services",
            &url(&services),
            "-listen-qemu",
            &url(&qemu),
        ]));
        let (mut socket, _) = listener.accept().unwrap();
        for path in [&listen, &services, &qemu] {
            assert!(path.exists(), "{}", path.display());
        }
        assert!(std::net::TcpStream::connect("127.0.0.1:40222").is_ok());
        let mut line = String::new();
        std::io::Read::read_to_string(&mut socket, &mut line).unwrap();
        assert_eq!(line, "{\"notification_type\":\"ready\"}\n");
        gvproxy.signal(Signal::SIGTERM);
        assert_eq!(gvproxy.wait().code, 0);
        for path in [&listen, &services, &qemu] {
            assert!(!path.exists(), "{}", path.display());
        }
    });
}

#[test]
fn a_change_of_the_hosts_network_under_load_wedges_nothing() {
    staged(a_change_of_the_hosts_network_under_load_wedges_nothing, |world| {
        let server = http(world.internet(), "203.0.113.10:80");
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
        // Connections and lookups all the while, of which those in the gap fail.
        let mut running = world.guest_script(&socket,
            "while :; do curl -sS -m 2 -o /dev/null http://203.0.113.10/ 2>/dev/null && echo ok || echo failed; \
             echo x > /dev/udp/203.0.113.10/9; done",
        );
        running.prints("ok");
        let change = "set -e; a=$(ip -o -4 addr show dev host0 | awk '{print $4}'); ip addr del $a dev host0; \
                      ip link set host0 down; sleep 4; ip link set host0 up; ip addr add 203.0.113.77/24 dev host0";
        let mut shell = world.program("sh");
        shell.args(["-c", change]);
        let changed = Running::start(shell).wait();
        assert_eq!(changed.code, 0, "{changed:?}");
        assert!(running.stdout().contains("failed"), "there was a gap");
        let before = server.connections();
        eventually("connections are made again", || server.connections() > before + 5);
        drop(running);

        // Nothing goes on in circles when nobody asks for anything.
        let [pid] = world.processes("__dataplane")[..] else {
            panic!("there is one dataplane");
        };
        let ticks = || -> u64 {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        eventually("the guest is gone", || world.list(&["vm", "list"]).is_empty());
        let before = ticks();
        std::thread::sleep(Duration::from_secs(2));
        let used = ticks() - before;
        assert!(
            used < 40,
            "{used} hundredths of a second of processor time in two seconds"
        );
    });
}

/// A host that sleeps stops all of it, its guests too, while time goes on.
#[test]
fn after_a_sleep_what_was_open_goes_on_and_new_connections_are_made() {
    staged(
        after_a_sleep_what_was_open_goes_on_and_new_connections_are_made,
        |world| {
            let server = http(world.internet(), "203.0.113.10:80");
            let _echo = vnet_tests::tcp(world.internet(), "203.0.113.10:7000", |stream, _| {
                let _ = std::io::copy(&mut &stream, &mut &stream);
            });
            let policy = world.file("open.yaml", "version: 1\ndefaultAction: allow\n");
            let flags = [
                "-ssh-port",
                "-1",
                "-network-policy",
                &policy.display().to_string(),
            ];
            let (gvproxy, socket) = world.gvproxy_for_qemu(&flags);
            let mut guest = world.guest_script(
                &socket,
                "exec 3<>/dev/tcp/203.0.113.10/7000; n=0; while n=$((n+1)); do \
             [ -e night ] && echo asleep; while [ -e night ]; do sleep 0.1; done; \
             echo $n >&3; read -t 10 -u 3 line && [ $line = $n ] || exit 1; \
             curl -sS -m 2 -o /dev/null http://203.0.113.10/ 2>/dev/null && echo ok $n; done",
            );
            guest.prints("ok 3\n");

            let all = [
                world.processes("__dataplane"),
                world.processes("__controlplane"),
                vec![gvproxy.pid()],
            ];
            let [dataplane, controlplane, _] = &all;
            assert_eq!((dataplane.len(), controlplane.len()), (1, 1));
            let signal = |signal| {
                for pid in all.iter().flatten() {
                    nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), signal).unwrap();
                }
            };
            let night = world.file("night", "");
            guest.prints("asleep");
            signal(Signal::SIGSTOP);
            // Longer than either side of the session bears silence, and than what is cached holds without a heartbeat.
            std::thread::sleep(Duration::from_secs(65));
            signal(Signal::SIGCONT);
            fs::remove_file(night).unwrap();

            let before = server.connections();
            eventually("connections are made again", || server.connections() > before + 5);
            assert!(
                !guest.has_ended(),
                "what was open before is still: {}",
                guest.stdout()
            );
            let vms = world.list(&["vm", "list"]);
            assert!(
                matches!(&vms[..], [vm] if vm["state"] == "VM_STATE_ATTACHED"),
                "one guest, as before: {vms:?}"
            );
            gvproxy.signal(Signal::SIGTERM);
            assert_eq!(gvproxy.wait_for(Duration::from_secs(100)).code, 0);
        },
    );
}

/// Names how many connections the test below makes, where 10,000 are too few (docs/tests.md has a million).
const CONNECTIONS: &str = "VNET_TEST_CONNECTIONS";

/// What a guest's sockets see of each way in which a connection ends.
const ENDS: &str = r#"
import errno, socket, struct
def connected(port):
    return socket.create_connection(('203.0.113.10', port), 10)
def rest(s):
    got = b''
    while data := s.recv(65536): got += data
    return got
# Half closed by the guest: all of the answer comes after it.
s = connected(8001); s.sendall(b'q' * 100000); s.shutdown(socket.SHUT_WR)
print('guest', rest(s) == b'100000' + b'a' * 300000)
# Half closed by the server: the guest can still send.
s = connected(8002); print('server', rest(s) == b'first'); s.sendall(b'and then some'); s.close()
# Reset by the server.
s = connected(8003); s.sendall(b'x')
try: rest(s); print('no reset')
except ConnectionResetError: print('reset')
# Reset by the guest.
s = connected(8004); s.sendall(b'x'); s.recv(1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()
# Refused.
try: connected(8005); print('no refusal')
except ConnectionRefusedError: print('refused')
"#;

#[test]
fn closing_is_what_it_was_right_after_many_connections() {
    staged(closing_is_what_it_was_right_after_many_connections, |world| {
        use std::io::{Read as _, Write as _};
        use std::net::Shutdown;

        let count = std::env::var(CONNECTIONS).map_or(10_000, |count| count.parse().expect("a number"));
        let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::<String>::new()));
        let sees = |what: &'static str| {
            let seen = std::sync::Arc::clone(&seen);
            move |how: &str| seen.lock().unwrap().push(format!("{what} {how}"))
        };
        let told = sees("server");
        let _half = vnet_tests::tcp(world.internet(), "203.0.113.10:8001", |mut stream, _| {
            let mut got = Vec::new();
            let length = stream.read_to_end(&mut got).unwrap();
            let _ = write!(stream, "{length}{}", "a".repeat(300_000));
        });
        let _other_half = vnet_tests::tcp(world.internet(), "203.0.113.10:8002", move |mut stream, _| {
            let mut got = String::new();
            stream.write_all(b"first").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            stream.read_to_string(&mut got).unwrap();
            told(&format!("got {got}"));
        });
        let _resetting = vnet_tests::tcp(world.internet(), "203.0.113.10:8003", |mut stream, _| {
            stream.read_exact(&mut [0]).unwrap();
            let linger = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
        });
        let told = sees("server");
        let _reset = vnet_tests::tcp(world.internet(), "203.0.113.10:8004", move |mut stream, _| {
            stream.read_exact(&mut [0]).unwrap();
            stream.write_all(b"y").unwrap();
            told(&format!(
                "sees {:?}",
                stream.read(&mut [0]).map_err(|error| error.kind())
            ));
        });
        let mut serve = world.load();
        serve.args(["serve", "--bind", "203.0.113.10", "--ports", "64"]);
        let _serving = vnet_tests::servers::inside(world.internet(), move || Running::start(serve));

        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "-1"]);
        world.file("ends.py", ENDS);
        let load = world.load().get_program().display().to_string();
        let script = format!(
            "python3 ends.py && echo many && \
             {load} connect --to 203.0.113.10 --ports 64 --parallel 64 --secs 900 --count {count} && python3 ends.py"
        );
        let mut running = world.guest_script(&socket, &script);
        running.prints("many\n");
        let (before, memory) = (descriptors(world), resident(world));
        let ended = running.wait_for(std::time::Duration::from_secs(900));
        let (first, rest) = ended.stdout.split_once("many\n").expect("it came so far");
        let (load, last) = rest.split_once('\n').expect("a line of figures");
        let figures: serde_json::Value = serde_json::from_str(load).expect("JSON");
        assert_eq!(
            (&figures["done"], &figures["fails"]),
            (&count.into(), &0.into()),
            "{figures}"
        );
        assert_eq!(first, "guest True\nserver True\nreset\nrefused\n", "{ended:?}");
        assert_eq!(last, first, "{ended:?}");
        let mut seen = seen.lock().unwrap().clone();
        seen.sort();
        let expected = ["got and then some", "sees Err(ConnectionReset)"];
        let expected: Vec<String> = expected
            .iter()
            .flat_map(|e| vec![format!("server {e}"); 2])
            .collect();
        assert_eq!(seen, expected);
        // Nothing is kept of what has ended.
        eventually("every descriptor is closed", || descriptors(world) <= before + 8);
        eventually("no flow is listed", || world.list(&["flows", "list"]).is_empty());
        let grown = resident(world).saturating_sub(memory);
        assert!(grown < 64 << 10, "{grown} KiB more than before");
        println!("{figures} {grown} KiB more");
    });
}

/// Memory of the dataplane, in KiB.
fn resident(world: &World) -> u64 {
    let [pid] = world.processes("__dataplane")[..] else {
        panic!("there is one dataplane");
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
