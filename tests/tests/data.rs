//! What a real Linux stack meets behind a dataplane: bytes whole in both directions, ends passed on as they
//! were made, and the refusals of a real network.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::Signal;
use vnet_tests::{Running, Server, World, binaries, echo, eventually, http, staged, tcp, udp_echo};
use vnetctl::sandbox::stage::NetNs;

/// Opens the stage's internet.
const OPEN: [&str; 4] = ["--allow", "tcp 203.0.113.0/24", "--allow", "udp 203.0.113.0/24"];

/// Fetches `down`, sends `up`, and prints the answer that follows the half close.
const DOWN_AND_UP: &str = "curl -sS -o down http://203.0.113.10:8000/ && python3 -c \"
import socket
s = socket.create_connection(('203.0.113.10', 9000)); s.sendall(open('up', 'rb').read())
s.shutdown(socket.SHUT_WR); print(s.recv(100).decode(), end='')
\"";

#[test]
fn a_hundred_megabytes_arrive_whole_in_each_direction() {
    staged(a_hundred_megabytes_arrive_whole_in_each_direction, |world| {
        let payload = Arc::new(random_bytes(100_000_000));
        let (_source, collected) = source_and_sink(world.internet(), &payload);
        fs::write(world.work().join("up"), &*payload).unwrap();
        let ended = world
            .run(
                &["--allow", "tcp 203.0.113.10:8000-9000"],
                &["sh", "-c", DOWN_AND_UP],
            )
            .wait_for(Duration::from_secs(120));
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(fs::read(world.work().join("down")).unwrap() == *payload, "down");
        assert!(*collected.lock().unwrap() == *payload, "up");
        assert_eq!(
            ended.stdout, "100000000",
            "the answer after the guest's half close"
        );
    });
}

#[test]
fn four_megabytes_arrive_whole_over_a_link_that_loses_and_reorders() {
    staged(
        four_megabytes_arrive_whole_over_a_link_that_loses_and_reorders,
        |world| {
            let payload = Arc::new(random_bytes(4_000_000));
            let (_source, collected) = source_and_sink(world.internet(), &payload);
            fs::write(world.work().join("up"), &*payload).unwrap();
            let (mut up, socket) = world.up(&["--allow", "tcp 203.0.113.10:8000-9000"]);
            let mut guest = world.load();
            // 1 % of the frames are lost in each direction and 5 % overtaken.
            guest.args([
                "guest",
                "--socket",
                &socket,
                "--loss",
                "10",
                "--reorder",
                "50",
                "--",
                "sh",
                "-c",
            ]);
            guest.arg(DOWN_AND_UP);
            let ended = Running::start(guest).wait_for(Duration::from_secs(120));
            assert_eq!(ended.code, 0, "{ended:?}");
            assert!(fs::read(world.work().join("down")).unwrap() == *payload, "down");
            assert!(*collected.lock().unwrap() == *payload, "up");
            assert!(!up.has_ended());
        },
    );
}

#[test]
fn whoever_does_not_read_holds_up_the_other_and_gets_all_of_it_later() {
    staged(
        whoever_does_not_read_holds_up_the_other_and_gets_all_of_it_later,
        |world| {
            let payload = Arc::new(random_bytes(20_000_000));
            fs::write(world.work().join("payload"), &*payload).unwrap();
            // That it has written all of it is seen by a file.
            let (sent, written) = (Arc::clone(&payload), world.work().join("written"));
            let _source = tcp(world.internet(), "203.0.113.10:8000", move |mut stream, _| {
                let _ = stream.write_all(&sent).and_then(|()| fs::write(&written, ""));
            });
            let heard = Arc::new(Mutex::new(None));
            let (hears, sent) = (Arc::clone(&heard), world.work().join("sent"));
            let _sink = tcp(world.internet(), "203.0.113.10:9000", move |mut stream, _| {
                std::thread::sleep(Duration::from_secs(2));
                let waited = !sent.exists();
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes);
                *hears.lock().unwrap() = Some((waited, bytes));
            });
            let ended = python(
                world,
                &["--allow", "tcp 203.0.113.10:8000-9000"],
                "
import os
payload = open('payload', 'rb').read()
s = socket.create_connection(('203.0.113.10', 9000)); s.sendall(payload); open('sent', 'w'); s.close()
s = socket.create_connection(('203.0.113.10', 8000)); time.sleep(2); waited = not os.path.exists('written')
data = bytearray()
while chunk := s.recv(65536): data += chunk
print(waited, data == payload)
",
            );
            assert_eq!(ended, "True True\n", "down");
            eventually("the server has heard all", || heard.lock().unwrap().is_some());
            let (waited, bytes) = heard.lock().unwrap().take().unwrap();
            assert!(
                waited,
                "20 MB were taken from the guest for a server that read nothing"
            );
            assert!(bytes == *payload, "up");
        },
    );
}

#[test]
fn half_closes_are_passed_on_both_ways() {
    staged(half_closes_are_passed_on_both_ways, |world| {
        // Answers only after the guest's end of data, with which the connection stays half open.
        let _late = tcp(world.internet(), "203.0.113.10:4000", |mut stream, _| {
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            std::thread::sleep(Duration::from_millis(200));
            let _ = write!(stream, "{} after the end", all.len());
        });
        // Ends its data at once, and goes on listening.
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&heard);
        let _early = tcp(world.internet(), "203.0.113.10:4001", move |mut stream, _| {
            let _ = stream.write_all(b"first");
            let _ = stream.shutdown(Shutdown::Write);
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            hears.lock().unwrap().extend(all);
        });
        let ended = python(
            world,
            &OPEN,
            "
s = socket.create_connection(('203.0.113.10', 4000)); s.sendall(b'x' * 1000); s.shutdown(socket.SHUT_WR)
print(read_all(s))
s = socket.create_connection(('203.0.113.10', 4001))
print(read_all(s)); time.sleep(0.2); s.sendall(b'still heard'); s.close()
",
        );
        assert_eq!(ended, "1000 after the end\nfirst\n");
        eventually("the server has heard all", || {
            *heard.lock().unwrap() == b"still heard"
        });
    });
}

#[test]
fn resets_are_passed_on_both_ways() {
    staged(resets_are_passed_on_both_ways, |world| {
        let reset = tcp(world.internet(), "203.0.113.10:4000", |mut stream, _| {
            let mut byte = [0];
            let _ = stream.read_exact(&mut byte);
            close_with_reset(&stream);
        });
        let met = Arc::new(Mutex::new(None));
        let meets = Arc::clone(&met);
        let _listens = tcp(world.internet(), "203.0.113.10:4001", move |mut stream, _| {
            let mut byte = [0; 16];
            let end = loop {
                match stream.read(&mut byte) {
                    Ok(1..) => {}
                    Ok(_) => break "end".to_owned(),
                    Err(error) => break error.kind().to_string(),
                }
            };
            *meets.lock().unwrap() = Some(end);
        });
        let ended = python(
            world,
            &OPEN,
            "
s = socket.create_connection(('203.0.113.10', 4000)); s.sendall(b'x')
try: s.recv(1); print('no reset')
except ConnectionResetError: print('reset')
s = socket.create_connection(('203.0.113.10', 4001)); s.sendall(b'x'); time.sleep(0.2)
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close(); time.sleep(0.5)
",
        );
        assert_eq!(ended, "reset\n");
        assert_eq!(reset.connections(), 1);
        eventually("the server meets the reset", || {
            met.lock().unwrap().as_deref() == Some("connection reset")
        });
    });
}

#[test]
fn refused_and_unreachable_destinations_are_told_apart_as_on_a_real_network() {
    staged(
        refused_and_unreachable_destinations_are_told_apart_as_on_a_real_network,
        |world| {
            let ended = python(
                world,
                &[&OPEN[..], &["--allow", "tcp 100.64.0.0/10"]].concat(),
                "
import errno
def what(f, *args):
    try: return f(*args)
    except OSError as e: return errno.errorcode.get(e.errno, repr(e))
def tcp(to):
    s = socket.socket(); return what(s.connect, to)
def udp(to):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(to); s.send(b'x'); return what(s.recv, 1)
print(tcp(('203.0.113.10', 81)), tcp(('100.64.0.1', 80)), udp(('203.0.113.10', 81)))
",
            );
            // Which of the two it is depends on whether the host has a way there at all.
            let ended = ended.replace("ENETUNREACH", "EHOSTUNREACH");
            assert_eq!(ended, "ECONNREFUSED EHOSTUNREACH ECONNREFUSED\n");
        },
    );
}

#[test]
fn a_thousand_connections_at_once_are_served() {
    staged(a_thousand_connections_at_once_are_served, |world| {
        let server = echo(world.internet(), "203.0.113.10:7000");
        let mut hold = world.command(&["run", "--allow", "tcp 203.0.113.10:7000", "--"]);
        hold.arg(binaries::binary("vnet-load"));
        hold.args([
            "hold",
            "--to",
            "203.0.113.10",
            "--port",
            "7000",
            "--ports",
            "1",
            "--count",
            "1000",
        ]);
        // Its input has ended, so it asks every connection once more as soon as all are there.
        let ended = Running::start(hold).wait_for(Duration::from_secs(90));
        assert!(ended.stdout.contains("\"opened\":1000"), "{ended:?}");
        assert!(ended.stdout.contains("{\"alive\":1000}"), "{ended:?}");
        assert_eq!(server.connections(), 1000);
    });
}

#[test]
fn datagrams_and_echo_requests_come_back() {
    staged(datagrams_and_echo_requests_come_back, |world| {
        let server = udp_echo(world.internet(), "203.0.113.10:5000");
        let ended = python(
            world,
            &OPEN,
            "
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(10); s.connect(('203.0.113.10', 5000))
for n in (0, 1, 1472, 8000):
    s.send(b'x' * n); print(len(s.recv(65536)))
",
        );
        assert_eq!(ended, "0\n1\n1472\n8000\n");
        assert_eq!(server.requests(), 4);

        // `run` gives its command no capability; a ping socket needs none where the group may.
        let (_up, socket) = world.up(&[]);
        let mut guest = world.load();
        guest.args([
            "guest",
            "--socket",
            &socket,
            "--",
            "ping",
            "-c",
            "2",
            "-W",
            "5",
            "192.168.127.1",
        ]);
        let ended = Running::start(guest).wait();
        assert_eq!(ended.code, 0, "{ended:?}");
    });
}

#[test]
fn published_ports_lead_into_the_guest() {
    staged(published_ports_lead_into_the_guest, |world| {
        let mut run = world.run(
            &[
                "--allow",
                "tcp 203.0.113.10:1",
                "-p",
                "18080:8080",
                "-p",
                "15353:5353/udp",
            ],
            &[
                "python3",
                "-uc",
                "
import socket
t = socket.socket(); t.bind(('', 8080)); t.listen()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 5353))
u.sendto(b'x', ('192.168.127.1', 9)); print('ready')
c, _ = t.accept(); c.sendall(c.recv(100).upper()); c.close()
d, a = u.recvfrom(100); u.sendto(d.upper(), a)
",
            ],
        );
        run.prints("ready");
        let mut stream = TcpStream::connect("127.0.0.1:18080").unwrap();
        stream.write_all(b"over tcp").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "OVER TCP");
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.send_to(b"over udp", "127.0.0.1:15353").unwrap();
        let mut datagram = [0; 100];
        let length = socket.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..length], b"OVER UDP");
        let ended = run.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        world.is_clean();
    });
}

#[test]
fn a_forward_that_is_closed_cuts_what_came_through_it_and_says_so() {
    staged(
        a_forward_that_is_closed_cuts_what_came_through_it_and_says_so,
        |world| {
            let mut run = world.run(
                &["--mode", "ask", "-p", "18080:8080", "-p", "15353:5353/udp"],
                &[
                    "python3",
                    "-uc",
                    "
import socket
t = socket.socket(); t.bind(('', 8080)); t.listen()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('', 5353))
print('ready')
c, _ = t.accept(); d, _ = t.accept(); c.sendall(b'c'); d.sendall(b'd')
_, a = u.recvfrom(100); u.sendto(b'u', a)
for s in (c, d):
    try: print('end', s.recv(100))
    except ConnectionResetError: print('cut')
u.recv(100)
",
                ],
            );
            run.prints("ready");
            let mut clients = ["127.0.0.1:18080"; 2].map(|to| TcpStream::connect(to).unwrap());
            for client in &mut clients {
                client.read_exact(&mut [0]).unwrap();
            }
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            socket.send_to(b"x", "127.0.0.1:15353").unwrap();
            socket.recv(&mut [0; 8]).unwrap();

            let said = world.vnetctl(&["forward", "remove", "127.0.0.1:18080"]);
            assert!(
                said.contains(
                    "closed tcp 127.0.0.1:18080 -> 192.168.127.2:8080; 2 live flows on 1 dataplane were cut"
                ),
                "{said}"
            );
            run.prints("cut\ncut\n");
            for client in &mut clients {
                assert_ne!(client.read(&mut [0]).ok(), Some(1), "its client sees the end");
            }
            assert!(TcpStream::connect("127.0.0.1:18080").is_err());
            let said = world.json(&["forward", "remove", "127.0.0.1:15353/udp"]);
            assert_eq!(said["cut"]["flows"], "1", "{said}");
            assert_eq!(said["cut"]["dataplanesCut"], 1, "{said}");
            run.signal(Signal::SIGTERM);
            run.wait();
            world.is_clean();
        },
    );
}

#[test]
fn the_host_alias_leads_to_the_hosts_loopback() {
    staged(the_host_alias_leads_to_the_hosts_loopback, |world| {
        let server = http(world.host(), "127.0.0.1:8088");
        let fetch = "curl -sS --max-time 20 http://192.168.127.254:8088/alias";
        let ended = world.script(&["--allow", "tcp 192.168.127.254:8088"], fetch);
        assert_eq!(ended.stdout, "this is 127.0.0.1:8088 at /alias\n", "{ended:?}");
        let ended = world.script(&["--allow", "tcp 203.0.113.10:80"], fetch);
        assert_ne!(ended.code, 0, "not without being named: {ended:?}");
        assert_eq!(server.requests(), 1);
    });
}

/// Runs a Python script in a guest; gives what it prints.
fn python(world: &World, flags: &[&str], script: &str) -> String {
    let prelude = "
import socket, struct, time
socket.setdefaulttimeout(20)
def read_all(s):
    data = b''
    while chunk := s.recv(65536): data += chunk
    return data.decode()
";
    let ended = world
        .run(flags, &["python3", "-c", &format!("{prelude}{script}")])
        .wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.stdout
}

type Collected = Arc<Mutex<Vec<u8>>>;

/// A server of this on port 8000, and one on port 9000 that collects, and answers with the number of bytes.
fn source_and_sink(internet: &NetNs, payload: &Arc<Vec<u8>>) -> (Server, Collected) {
    let sent = Arc::clone(payload);
    let source = tcp(internet, "203.0.113.10:8000", move |mut stream, _| {
        let mut request = [0; 4096];
        let _ = stream.read(&mut request);
        let _ = write!(
            stream,
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
            sent.len()
        );
        let _ = stream.write_all(&sent);
    });
    let collected = Collected::default();
    let into = Arc::clone(&collected);
    let _sink = tcp(internet, "203.0.113.10:9000", move |mut stream, _| {
        let mut bytes = Vec::new();
        if stream.read_to_end(&mut bytes).is_ok() {
            let length = bytes.len();
            *into.lock().unwrap() = bytes;
            let _ = write!(stream, "{length}");
        }
    });
    (source, collected)
}

fn random_bytes(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("there is randomness");
    bytes
}

/// Has the close of this be a reset.
fn close_with_reset(stream: &std::net::TcpStream) {
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger)
        .expect("a socket lingers");
}
