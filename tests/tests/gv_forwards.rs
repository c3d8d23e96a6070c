//! Forwards as a user has them: Unix sockets, ranges, both families, the client's own address, many clients, and
//! what is said of a port that another has.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use vnet_tests::servers::inside;
use vnet_tests::{Running, World, eventually, staged, staged_with};
use vnetctl::sandbox::stage::StageSpec;

/// The guest's address.
const GUEST: &str = "192.168.127.2";
const PATIENCE: Duration = Duration::from_secs(20);

/// Serves TCP on each address of the list: says who the client is.
const SAYS_WHO: &str = "
import socket, sys, threading
def serve(s):
    while True:
        c, a = s.accept()
        c.sendall(('%s %d' % (a[0], s.getsockname()[1])).encode()); c.close()
for place in sys.argv[1:]:
    host, port = place.rsplit(' ', 1)
    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ':' in host: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((host, int(port))); s.listen(64)
    threading.Thread(target=serve, args=(s,)).start()
    # A guest's first packet over IPv6 shows its address.
    if ':' in host: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(b'', ('fd00::1', 9))
print('ready', flush=True)
";

/// A guest with these flags that says on each of these places who comes.
fn says_who(world: &World, flags: &[&str], places: &[&str]) -> Running {
    let command = [&["python3", "-c", SAYS_WHO], places].concat();
    let mut run = world.run(flags, &command);
    run.prints("ready");
    run
}

fn end(run: Running) {
    run.signal(Signal::SIGTERM);
    run.wait();
}

/// What somebody who connects there hears; empty when nobody is there.
fn hear(to: SocketAddr) -> String {
    let mut said = String::new();
    if let Ok(mut stream) = TcpStream::connect_timeout(&to, PATIENCE) {
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let _ = stream.read_to_string(&mut said);
    }
    said
}

fn listens(world: &World) -> BTreeSet<String> {
    let forwards = world.list(&["forward", "list"]);
    let listen = |f: &serde_json::Value| f["listen"].as_str().map(str::to_owned);
    forwards.iter().filter_map(listen).collect()
}

/// What `vnetctl` says to an attempt that must fail.
fn refusal(world: &World, words: &[&str]) -> String {
    let ended = world.try_vnetctl(words);
    assert_ne!(ended.code, 0, "{ended:?}");
    ended.stderr
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

#[test]
fn a_unix_socket_leads_into_a_guest_and_goes_with_its_forward() {
    staged(
        a_unix_socket_leads_into_a_guest_and_goes_with_its_forward,
        |world| {
            let path = world.runtime_dir().join("web.sock");
            let serve = "
from http.server import *
class Say(BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())
    def log_message(self, *a): pass
s = HTTPServer(('192.168.127.2', 80), Say)
print('ready', flush=True)
s.serve_forever()";
            let publish = format!("unix://{}:80", path.display());
            let mut run = world.run(&["-p", &publish], &["python3", "-c", serve]);
            run.prints("ready");
            let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let curl = |path: &Path| {
                let mut command = world.program("curl");
                command
                    .args(["-sS", "-m", "20", "--unix-socket"])
                    .arg(path)
                    .arg("http://guest/");
                Running::start(command).wait()
            };
            let mut ended = curl(&path);
            eventually("the forward answers", || {
                if ended.code != 0 {
                    ended = curl(&path);
                }
                ended.code == 0
            });
            assert_eq!(ended.stdout, "192.168.127.1", "a Unix client has no address");

            // One more, to the guest by its address, while it runs; its text may be encoded.
            let second = world.runtime_dir().join("a b.sock");
            let url = format!("unix://{}", second.display()).replace(' ', "%20");
            let said = world.vnetctl(&["forward", "add", &format!("{url}:192.168.127.2:80")]);
            assert_eq!(said, format!("opened tcp {url} -> 192.168.127.2:80\n"));
            assert_eq!(curl(&second).stdout, "192.168.127.1");
            assert!(listens(world).contains(&url));
            let said = refusal(world, &["forward", "add", &format!("{url}:{GUEST}:81")]);
            assert!(
                said.contains(&format!(
                    "tcp {url} is already in use by this network's forward from {url} to 192.168.127.2:80"
                )),
                "{said}"
            );
            let said = world.vnetctl(&["forward", "remove", &url]);
            assert!(
                said.starts_with(&format!("closed tcp {url} -> 192.168.127.2:80")),
                "{said}"
            );
            assert!(!second.exists());

            end(run);
            assert!(!path.exists(), "the file is gone with the guest");
            world.is_clean();
        },
    );
}

#[test]
fn a_file_deletion_through_a_forward_is_refused() {
    staged(a_file_deletion_through_a_forward_is_refused, |world| {
        let run = says_who(world, &[], &["192.168.127.2 80"]);
        let precious = world.file("precious", "precious");
        let directory = world.work().join("directory");
        fs::create_dir(&directory).unwrap();
        let link = world.work().join("link");
        std::os::unix::fs::symlink(&precious, &link).unwrap();
        for (path, found) in [
            (&precious, "is a file"),
            (&directory, "is a directory"),
            (&link, "is a symbolic link"),
        ] {
            let url = format!("unix://{}", path.display());
            let said = refusal(world, &["forward", "add", &format!("{url}:{GUEST}:80")]);
            assert!(
                said.contains(&format!(
                    "{url} is there already and {found}; it is left as it is"
                )),
                "{said}"
            );
            // Nor does closing what was never opened.
            let said = refusal(world, &["forward", "remove", &url]);
            assert!(said.contains("no forward listens on"), "{said}");
        }
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        assert!(directory.is_dir() && link.is_symlink());

        // A socket that somebody serves stays as well; one that nobody does is replaced.
        let served = world.work().join("served");
        let listener = std::os::unix::net::UnixListener::bind(&served).unwrap();
        let url = format!("unix://{}", served.display());
        let said = refusal(world, &["forward", "add", &format!("{url}:{GUEST}:80")]);
        assert!(said.contains(&format!("{url} is already in use")), "{said}");
        drop(listener);
        world.vnetctl(&["forward", "add", &format!("{url}:{GUEST}:80")]);
        assert!(is_socket(&served));
        end(run);
        assert!(!served.exists());
    });
}

#[test]
fn a_range_is_opened_and_closed_whole_or_not_at_all() {
    staged(a_range_is_opened_and_closed_whole_or_not_at_all, |world| {
        let places: Vec<String> = (8000..=8010)
            .map(|port| format!("192.168.127.2 {port}"))
            .collect();
        let places: Vec<&str> = places.iter().map(String::as_str).collect();
        let run = says_who(world, &["-p", "18000-18010:8000-8010"], &places);
        for port in 0..=10u16 {
            let to = SocketAddr::from(([127, 0, 0, 1], 18000 + port));
            assert_eq!(hear(to), format!("192.168.127.1 {}", 8000 + port));
        }

        // A port in the middle is this program's.
        let taken = TcpListener::bind("127.0.0.1:18105").unwrap();
        let before = listens(world);
        let said = refusal(world, &["forward", "add", "18100-18110:192.168.127.2:8000-8010"]);
        let name = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(
            said.contains(&format!(
                "tcp 127.0.0.1:18105 is already in use by {} (pid {})",
                name.trim(),
                std::process::id()
            )),
            "{said}"
        );
        assert_eq!(listens(world), before, "nothing is half open");
        for port in (18100..18105).chain(18106..=18110) {
            assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "{port} is free");
        }
        drop(taken);
        let said = world.vnetctl(&["forward", "add", "18100-18110:192.168.127.2:8000-8010"]);
        assert_eq!(
            said,
            "opened tcp 127.0.0.1:18100-18110 -> 192.168.127.2:8000-8010\n"
        );
        assert_eq!(
            hear(SocketAddr::from(([127, 0, 0, 1], 18110))),
            "192.168.127.1 8010"
        );
        assert_eq!(listens(world).len(), before.len() + 11);

        // Closed together, but only if each is there.
        world.vnetctl(&["forward", "remove", "127.0.0.1:18103"]);
        let said = refusal(world, &["forward", "remove", "127.0.0.1:18100-18110"]);
        assert!(said.contains("no forward listens on 127.0.0.1:18103"), "{said}");
        assert_eq!(listens(world).len(), before.len() + 10);
        let said = world.vnetctl(&["forward", "remove", "127.0.0.1:18104-18110"]);
        assert!(
            said.starts_with("closed tcp 127.0.0.1:18104-18110 -> 192.168.127.2:8004-8010"),
            "{said}"
        );
        assert_eq!(listens(world).len(), before.len() + 3);
        end(run);
    });
}

/// The usual stage with IPv6 on the wire.
fn dual() -> StageSpec {
    let nets = |texts: &[&str]| texts.iter().map(|net| net.parse().unwrap()).collect();
    StageSpec {
        host: nets(&["203.0.113.1/24", "2001:db8:1::1/64"]),
        internet: nets(&["203.0.113.10/24", "2001:db8:1::10/64"]),
        ..StageSpec::default()
    }
}

/// Its address was set by hand, and it only serves: nothing of it was ever sent that shows the address.
#[test]
fn a_guest_that_never_spoke_is_found_by_who_connects() {
    staged(a_guest_that_never_spoke_is_found_by_who_connects, |world| {
        let (_up, socket) = world.up(&[]);
        let add = |port: &str, to: &str| {
            let (port, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            let listen = format!("127.0.0.1:{port}");
            world.vnetctl(&["forward", "add", &format!("{listen}:{to}/{protocol}")]);
            listen.parse::<SocketAddr>().unwrap()
        };
        let there = add("18080", "192.168.127.7:80");
        let nobody = add("18081", "192.168.127.8:80");
        let datagrams = add("18082/udp", "192.168.127.9:53");
        let mut guest = world.load();
        guest.args([
            "guest",
            "--address",
            "192.168.127.7/24",
            "--socket",
            &socket,
            "--",
        ]);
        guest.args(["python3", "-c", SAYS_WHO, "192.168.127.7 80"]);
        let mut guest = Running::start(guest);
        guest.prints("ready");
        assert_eq!(hear(there), "192.168.127.1 80");
        assert_eq!(hear(nobody), "");

        let mut guest = world.load();
        guest.args([
            "guest",
            "--address",
            "192.168.127.9/24",
            "--socket",
            &socket,
            "--",
        ]);
        guest.args(["socat", "UDP-RECVFROM:53,fork", "EXEC:cat"]);
        let _guest = Running::start(guest);
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut heard = [0; 16];
        eventually("a datagram comes back", || {
            client.send_to(b"hello", datagrams).unwrap();
            matches!(client.recv(&mut heard), Ok(5))
        });
    });
}

#[test]
fn a_guest_sees_who_connects_where_that_is_asked_for() {
    staged_with(
        a_guest_sees_who_connects_where_that_is_asked_for,
        &dual(),
        |world| {
            let run = says_who(
                world,
                &[
                    "-p",
                    "0.0.0.0:8080:80+client",
                    // The same port of the other family is another place.
                    "-p",
                    "[::]:8080:[fd00::2]:80+client",
                    "-p",
                    "0.0.0.0:8081:80",
                    "-p",
                    "[::]:8082:192.168.127.2:80+client",
                ],
                &["192.168.127.2 80", "fd00::2 80"],
            );
            let from_outside = |to: &'static str| inside(world.internet(), move || hear(to.parse().unwrap()));
            for (to, seen) in [
                ("203.0.113.1:8080", "203.0.113.10 80"),
                ("[2001:db8:1::1]:8080", "2001:db8:1::10 80"),
                // Not asked for; of the other family.
                ("203.0.113.1:8081", "192.168.127.1 80"),
                ("[2001:db8:1::1]:8082", "192.168.127.1 80"),
            ] {
                let mut said = String::new();
                eventually("the forward answers", || {
                    said = from_outside(to);
                    !said.is_empty()
                });
                assert_eq!(said, seen, "{to} from outside");
            }
            // The host itself is seen as the gateway, by whatever address it comes.
            for (to, seen) in [
                ("127.0.0.1:8080", "192.168.127.1 80"),
                ("203.0.113.1:8080", "192.168.127.1 80"),
                ("[::1]:8080", "fd00::1 80"),
                ("[2001:db8:1::1]:8080", "fd00::1 80"),
            ] {
                assert_eq!(hear(to.parse().unwrap()), seen, "{to} from the host");
            }
            let kept: Vec<_> = world
                .list(&["forward", "list"])
                .iter()
                .filter(|f| f["keepClientAddress"] == true)
                .filter_map(|f| f["listen"].as_str().map(str::to_owned))
                .collect();
            assert_eq!(kept, ["0.0.0.0:8080", "[::]:8080", "[::]:8082"]);
            end(run);
        },
    );
}

/// Serves UDP on port 5353: says who the client is, and what it said.
const ECHOES_WHO: &str = "
import socket
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
u.bind(('192.168.127.2', 5353))
print('ready', flush=True)
while True:
    said, a = u.recvfrom(2000)
    u.sendto(('%s %d ' % a).encode() + said, a)
";

/// What the guest says to this from there; empty when it says nothing.
fn ask(socket: &UdpSocket, to: &str, what: &str) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let place: SocketAddr = to.parse().unwrap();
    let mut buffer = [0; 2000];
    // A datagram may be lost on the way, as any.
    for _ in 0..10 {
        socket.send_to(what.as_bytes(), place).unwrap();
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let said = String::from_utf8_lossy(&buffer[..length]);
            // Not an answer to something that was said before.
            if from == place && said.ends_with(&format!(" {what}")) {
                return said.into_owned();
            }
        }
    }
    String::new()
}

#[test]
fn a_udp_guest_sees_who_sends_where_that_is_asked_for_and_many_at_once() {
    staged(
        a_udp_guest_sees_who_sends_where_that_is_asked_for_and_many_at_once,
        |world| {
            let flags = [
                "-p",
                "0.0.0.0:15353:5353/udp+client",
                "-p",
                "0.0.0.0:15354:5353/udp",
            ];
            let mut run = world.run(&flags, &["python3", "-c", ECHOES_WHO]);
            run.prints("ready");
            let (port, kept, shown) = inside(world.internet(), || {
                let socket = UdpSocket::bind("203.0.113.10:0").unwrap();
                let port = socket.local_addr().unwrap().port();
                let kept = ask(&socket, "203.0.113.1:15353", "kept");
                (port, kept, ask(&socket, "203.0.113.1:15354", "shown"))
            });
            assert_eq!(kept, format!("203.0.113.10 {port} kept"), "port and all");
            assert!(
                shown.starts_with("192.168.127.1 ") && shown.ends_with(" shown"),
                "{shown}"
            );

            // Each of many clients has its own answers, and is another to the guest.
            let seen = inside(world.internet(), || {
                let sockets: Vec<UdpSocket> = (0..500)
                    .map(|_| UdpSocket::bind("203.0.113.10:0").unwrap())
                    .collect();
                let forwards = ["203.0.113.1:15353", "203.0.113.1:15354"];
                let mut seen = BTreeSet::new();
                for to in forwards {
                    for socket in &sockets {
                        socket.send_to(b"warm", to).unwrap();
                    }
                    for (number, socket) in sockets.iter().enumerate() {
                        let said = ask(socket, to, &format!("number {number}"));
                        let client = said.strip_suffix(&format!(" number {number}"));
                        seen.insert(client.unwrap_or_else(|| panic!("{number}: {said:?}")).to_owned());
                    }
                }
                seen
            });
            assert_eq!(seen.len(), 1000);
            assert_eq!(
                seen.iter().filter(|c| c.starts_with("203.0.113.10 ")).count(),
                500
            );
            end(run);
        },
    );
}

#[test]
fn a_port_that_another_has_is_refused_by_whose_it_is() {
    staged(a_port_that_another_has_is_refused_by_whose_it_is, |world| {
        let mut command = world.program("python3");
        command.args([
            "-c",
            "
import socket, time
t = socket.socket(); t.bind(('127.0.0.1', 18090)); t.listen()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('0.0.0.0', 18091))
print('listening', flush=True)
time.sleep(300)",
        ]);
        let mut holder = Running::start(command);
        holder.prints("listening");
        let by = |name: &str| format!("is already in use by {name} (pid {})", holder.pid());
        let comm = fs::read_to_string(format!("/proc/{}/comm", holder.pid())).unwrap();
        let by = by(comm.trim());

        // At the start: nothing begins.
        let ended = world.run(&["-p", "18090:80"], &["true"]).wait();
        assert_ne!(ended.code, 0, "{ended:?}");
        assert!(
            ended.stderr.contains(&format!("tcp 127.0.0.1:18090 {by}")),
            "{ended:?}"
        );

        // While guests run.
        let run = says_who(world, &["--vm", "one", "-p", "18092:80"], &["192.168.127.2 80"]);
        let said = refusal(world, &["forward", "add", "0.0.0.0:18090:192.168.127.2:80"]);
        assert!(said.contains(&format!("tcp 0.0.0.0:18090 {by}")), "{said}");
        let said = refusal(world, &["forward", "add", "18091:192.168.127.2:80/udp"]);
        assert!(said.contains(&format!("udp 127.0.0.1:18091 {by}")), "{said}");
        let said = refusal(world, &["forward", "add", "0.0.0.0:18092:192.168.127.2:81"]);
        assert!(
            said.contains(
                "tcp 0.0.0.0:18092 is already in use by this network's forward from 127.0.0.1:18092 to 192.168.127.2:80"
            ),
            "{said}"
        );

        // And by another network, whose dataplane is but a program to this one's.
        let other = says_who(world, &["--vm", "two"], &["192.168.127.2 80"]);
        let network = world
            .list(&["vm", "list"])
            .iter()
            .find(|vm| vm["name"] == "one")
            .unwrap()["network"]
            .clone();
        eventually("its address is known", || {
            let vms = world.list(&["vm", "list"]);
            vms.iter()
                .any(|vm| vm["name"] == "two" && vm["addresses"].as_array().is_some_and(|a| !a.is_empty()))
        });
        let said = refusal(world, &["forward", "add", "18092:80", "--vm", "two"]);
        assert!(
            said.contains(&format!(
                "tcp 127.0.0.1:18092 is already in use by network {}'s forward from 127.0.0.1:18092 to \
                 192.168.127.2:80; close it or forward another port",
                network.as_str().unwrap()
            )),
            "{said}"
        );
        end(run);
        end(other);
        holder.signal(Signal::SIGTERM);
        holder.wait();
    });
}
