//! The socket of `--listen` as clients of gvproxy use it: `/connect` as gvforwarder asks for it, `/tunnel`, and what
//! is none of them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use vnet_tests::{Controlplane, Running, World, eventually, http, staged};
use vnetctl::launch::{FrontMessage, FrontReceiver, HostStream, front};

const CONNECT: &[u8] = b"POST /connect HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\r\n";
const GATEWAY_MAC: [u8; 6] = [0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd];

/// `vnetctl up` with a `--listen` socket for VMs of which the first is `web`.
fn up(world: &World, flags: &[&str]) -> (Running, PathBuf) {
    let socket = world.runtime_dir().join("network.sock");
    let url = format!("unix://{}", socket.display());
    let words = [&["up", "--vm", "web", "--listen", &url], flags].concat();
    let mut up = Running::start(world.command(&words));
    up.complains("serving VM web");
    (up, socket)
}

/// A client that has said this.
fn client(socket: &Path, said: &[u8]) -> UnixStream {
    let mut client = UnixStream::connect(socket).unwrap();
    client.set_read_timeout(Some(vnet_tests::PATIENCE)).unwrap();
    client.write_all(said).unwrap();
    client
}

/// Everything that it is answered, up to the end.
fn answer(socket: &Path, said: &[u8]) -> String {
    let mut answer = Vec::new();
    client(socket, said).read_to_end(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}

/// A guest's question for the gateway's MAC address, behind its length.
fn question(own: u8) -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, own];
    let mut frame = vec![60, 0];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend([192, 168, 127, own]);
    frame.extend([0; 6]);
    frame.extend([192, 168, 127, 1]);
    frame.resize(62, 0);
    frame
}

/// The next ARP answer that a client is sent, whatever the network says beside it.
fn told(client: &mut UnixStream) -> Vec<u8> {
    loop {
        let mut length = [0; 2];
        client.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u16::from_le_bytes(length).into()];
        client.read_exact(&mut frame).unwrap();
        if frame[12..14] == [8, 6] && frame[21] == 2 {
            return frame;
        }
    }
}

fn names(world: &World) -> Vec<String> {
    let vms = world.list(&["vm", "list"]);
    let mut names: Vec<String> = vms
        .iter()
        // Those that may come back are not there.
        .filter(|vm| {
            vm["state"]
                .as_str()
                .is_some_and(|state| state.ends_with("_ATTACHED"))
        })
        .filter_map(|vm| Some(vm["name"].as_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

/// A namespace behind the socket, as a guest that has a stack of its own.
fn guest(world: &World, socket: &Path, command: &[&str]) -> Running {
    let mut load = world.load();
    load.args(["guest", "--framing", "connect", "--socket"])
        .arg(socket);
    load.arg("--").args(command);
    Running::start(load)
}

#[test]
fn gvforwarder_becomes_a_guest_and_the_frames_behind_its_request_are_kept() {
    staged(
        gvforwarder_becomes_a_guest_and_the_frames_behind_its_request_are_kept,
        |world| {
            let (_up, socket) = up(world, &[]);
            // The request and the first frame leave in one write, and nothing is waited for.
            let mut first = client(&socket, &[CONNECT, &question(2)].concat());
            let frame = told(&mut first);
            assert_eq!(frame[6..12], GATEWAY_MAC, "{frame:?}");
            assert_eq!(frame[28..32], [192, 168, 127, 1], "{frame:?}");
            // Another one, of an older HTTP and by another method; and a frame in pieces.
            let mut second = client(&socket, b"GET /connect HTTP/1.0\r\n\r\n");
            for byte in question(3) {
                second.write_all(&[byte]).unwrap();
            }
            assert_eq!(told(&mut second)[6..12], GATEWAY_MAC);
            eventually("both are there", || names(world) == ["web", "web-2"]);
            drop(second);
            eventually("one is gone", || names(world) == ["web"]);
            first.write_all(&question(2)).unwrap();
            told(&mut first);
        },
    );
}

#[test]
fn guests_stack_works_over_connect() {
    staged(guests_stack_works_over_connect, |world| {
        let (_up, socket) = up(world, &["--mtu", "4000"]);
        let server = http(world.internet(), "203.0.113.10:80");
        let fetch = "curl -sS -o got http://203.0.113.10/bytes/3000000 && wc -c < got && \
                     curl -sS http://203.0.113.10/end";
        let ended = guest(world, &socket, &["sh", "-c", fetch]).wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.stdout.starts_with("3000000\n"), "{ended:?}");
        assert_eq!(server.requests(), 2);
    });
}

#[test]
fn tunnels_reach_a_server_in_the_guest_and_pass_on_that_one_side_has_finished() {
    staged(
        tunnels_reach_a_server_in_the_guest_and_pass_on_that_one_side_has_finished,
        |world| {
            let (_up, socket) = up(world, &[]);
            // It says what it heard once it has heard all of it.
            let serve =
                "ping -c 1 192.168.127.1 && exec socat -t 30 TCP-LISTEN:7000,reuseaddr,fork SYSTEM:'wc -c'";
            let _guest = guest(world, &socket, &["sh", "-c", serve]);
            let request = |port: u16| {
                format!("POST /tunnel?ip=192.168.127.2&port={port} HTTP/1.1\r\nHost: \r\n\r\n").into_bytes()
            };
            // Until the guest has used its address and its server listens nobody is reached, and the tunnel ends.
            let talk = |port: u16, bytes: usize| {
                let mut said = request(port);
                said.resize(said.len() + bytes, b'x');
                let mut client = client(&socket, &said[..said.len() - bytes / 2]);
                // Where nobody is there any more, the end is what is looked at.
                let _ = client.write_all(&said[said.len() - bytes / 2..]);
                let _ = client.shutdown(Shutdown::Write);
                let mut answer = Vec::new();
                let _ = client.read_to_end(&mut answer);
                String::from_utf8(answer).unwrap()
            };
            eventually("the server in the guest is reached", || talk(7000, 0) == "OK0\n");
            assert_eq!(talk(7000, 10), "OK10\n");
            assert_eq!(talk(7000, 1_000_000), "OK1000000\n");
            assert_eq!(talk(7001, 0), "OK", "a port that is closed is an end");

            let missing = answer(&socket, b"GET /tunnel?port=22 HTTP/1.1\r\nHost: a\r\n\r\n");
            assert!(missing.starts_with("HTTP/1.1 500 "), "{missing}");
            assert!(missing.ends_with("\r\n\r\nip is mandatory\n"), "{missing}");
            let outside = answer(
                &socket,
                b"GET /tunnel?ip=203.0.113.10&port=80 HTTP/1.1\r\nHost: a\r\n\r\n",
            );
            assert_eq!(outside, "OK", "only guests are reached");

            for mode in ["enforce", "quarantine"] {
                world.vnetctl(&["vm", "mode", "web", mode]);
                eventually("a mode closes tunnels", || {
                    talk(7000, 10).starts_with("HTTP/1.1 403 Forbidden\r\n")
                });
            }
        },
    );
}

#[test]
fn idle_and_half_written_requests_delay_nobody() {
    staged(idle_and_half_written_requests_delay_nobody, |world| {
        let (_up, socket) = up(world, &[]);
        let idle: Vec<UnixStream> = (0..200)
            .map(|n| {
                client(
                    &socket,
                    if n % 2 == 0 {
                        b""
                    } else {
                        b"POST /connect HTTP/1.1\r\nHo"
                    },
                )
            })
            .collect();
        let began = Instant::now();
        let mut guest = client(&socket, &[CONNECT, &question(2)].concat());
        told(&mut guest);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        drop(idle);
    });
}

#[test]
fn what_is_not_served_is_told_as_go_does() {
    staged(what_is_not_served_is_told_as_go_does, |world| {
        let (_up, socket) = up(world, &[]);
        let socket_text = socket.display().to_string();
        let mut curl = world.program("curl");
        curl.args([
            "-sS",
            "-i",
            "--unix-socket",
            &socket_text,
            "http://unix/services/forwarder/all",
        ]);
        let ended = Running::start(curl).wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        let said = ended.stdout;
        assert!(said.starts_with("HTTP/1.1 404 Not Found\r\n"), "{said}");
        assert!(
            said.contains("\r\nContent-Type: text/plain; charset=utf-8\r\n"),
            "{said}"
        );
        assert!(said.ends_with("\r\n\r\n404 page not found\n"), "{said}");

        let no_host = answer(&socket, b"POST /connect HTTP/1.1\r\n\r\n");
        assert!(no_host.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{no_host}");
        let no_http = answer(&socket, b"\x16\x03\x01\x02\x00\n");
        assert!(no_http.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{no_http}");
        let long = answer(&socket, &[b'x'; 40_000]);
        assert!(long.starts_with("HTTP/1.1 431 "), "{long}");
        assert!(names(world).is_empty());
    });
}

/// A front that answers each connection that it is handed with what it is and what was asked for.
fn answer_as_front(runtime: &tokio::runtime::Runtime, mut receiver: FrontReceiver) {
    runtime.spawn(async move {
        while let Ok((message, HostStream::Unix(stream))) = receiver.receive().await {
            std::thread::spawn(move || {
                stream.set_nonblocking(false).unwrap();
                let (what, read) = match message {
                    FrontMessage::Services { listen, read } => (listen, read),
                    FrontMessage::Guest { vm, address } => (format!("guest {vm} {address}"), Vec::new()),
                    FrontMessage::Tunnel { .. } => return,
                };
                let mut asked = String::new();
                BufReader::new(read.chain(&stream)).read_line(&mut asked).unwrap();
                let answer = format!("HTTP/1.0 200 OK\r\n\r\n{what} is asked for {}", asked.trim());
                (&stream).write_all(answer.as_bytes()).unwrap();
            });
        }
    });
}

#[test]
fn fronts_are_handed_requests_and_guests_connections_and_open_tunnels() {
    staged(
        fronts_are_handed_requests_and_guests_connections_and_open_tunnels,
        |world| {
            let controlplane = Controlplane::start(world, Signal::SIGTERM);
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let _entered = runtime.enter();
            let (own, theirs) = front::pair().unwrap();
            let (sender, receiver) = front::open(own, Arc::default()).unwrap();
            answer_as_front(&runtime, receiver);
            let socket = world.runtime_dir().join("network.sock");
            let url = format!("unix://{}", socket.display());
            // The next program inherits it.
            fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            let mut command = world.program("vnet-dataplane");
            command.args([
                "--controlplane",
                controlplane.session_url(),
                "--vm",
                "web",
                "--guest-api",
            ]);
            command.args(["--listen", &url, "--front-fd", &theirs.as_raw_fd().to_string()]);
            let _dataplane = Running::start(command);
            drop(theirs);
            eventually("it listens", || UnixStream::connect(&socket).is_ok());

            let asked = answer(&socket, b"POST /services/dns/add HTTP/1.1\r\nHost: a\r\n\r\n{}");
            let expected =
                format!("HTTP/1.0 200 OK\r\n\r\n{url} is asked for POST /services/dns/add HTTP/1.1");
            assert_eq!(asked, expected);

            let script = "curl -sS http://192.168.127.1/services/forwarder/all > answer && touch answered && \
                          exec socat -t 30 TCP-LISTEN:7000,reuseaddr,fork SYSTEM:'wc -c'";
            let _guest = guest(world, &socket, &["sh", "-c", script]);
            eventually("the guest is answered", || world.work().join("answered").exists());
            let answered = std::fs::read_to_string(world.work().join("answer")).unwrap();
            assert_eq!(
                answered,
                "guest 1 192.168.127.2 is asked for GET /services/forwarder/all HTTP/1.1"
            );

            let through = |port: u16, said: &[u8]| {
                let (mut here, there) = UnixStream::pair().unwrap();
                let target = ([192, 168, 127, 2], port).into();
                sender.send(&FrontMessage::Tunnel { target }, there).unwrap();
                let _ = here.write_all(said);
                let _ = here.shutdown(Shutdown::Write);
                let mut answer = String::new();
                let _ = here.read_to_string(&mut answer);
                answer
            };
            eventually("a tunnel reaches the guest", || through(7000, b"hello") == "5\n");
            assert_eq!(through(7001, b""), "", "a port that is closed is an end");
            let flows = world.list(&["flows", "list"]);
            let to_the_gateway = |flow: &serde_json::Value| flow.to_string().contains("192.168.127.1:80");
            assert!(!flows.iter().any(to_the_gateway), "{flows:?}");
            drop(sender);
            controlplane.end();
        },
    );
}
