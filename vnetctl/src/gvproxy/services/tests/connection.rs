//! Connections: tunnels, limits, what is slow, half written, or not for us.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UnixStream;

use super::world::{Stopped, as_set, config, nowhere};
use super::*;

/// Streams whose other end a test has.
#[derive(Default)]
struct Inside(std::sync::Mutex<Vec<(SocketAddr, UnixStream)>>);

#[tonic::async_trait]
impl Tunnels for Inside {
    async fn open(&self, target: SocketAddr) -> std::io::Result<UnixStream> {
        if target.port() == 1 {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        self.0.lock().unwrap().push((target, ours));
        Ok(theirs)
    }
}

fn with_tunnels() -> (Arc<Services>, Arc<Inside>) {
    let inside = Arc::new(Inside::default());
    let services = Services::new(ServicesConfig {
        tunnels: Arc::clone(&inside) as Arc<dyn Tunnels>,
        ..config(nowhere(), "one")
    });
    (services, inside)
}

const TUNNEL: &str =
    "POST /tunnel?ip=192.168.127.2&port=22 HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\r\n";

async fn exactly(stream: &mut (impl tokio::io::AsyncRead + Unpin), expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    stream.read_exact(&mut read).await.unwrap();
    assert_eq!(read, expected);
}

#[tokio::test]
async fn a_tunnel_says_ok_and_is_a_stream_both_ways_with_an_end_each_way() {
    let (services, inside) = with_tunnels();
    for request in [
        TUNNEL,
        &TUNNEL.replace("POST", "GET"),
        &TUNNEL.replace("/tunnel", "http://x/tunnel"),
    ] {
        let mut client = connect(&services, Origin::Services);
        // In pieces, and with what is for the other end right behind it.
        let (head, rest) = request.split_at(20);
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(rest.as_bytes()).await.unwrap();
        client.write_all(b"SSH-2.0-x\r\n").await.unwrap();
        exactly(&mut client, b"OK").await;
        let (target, mut guest) = loop {
            if let Some(opened) = inside.0.lock().unwrap().pop() {
                break opened;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(target, "192.168.127.2:22".parse().unwrap());
        exactly(&mut guest, b"SSH-2.0-x\r\n").await;
        client.shutdown().await.unwrap();
        let mut end = Vec::new();
        guest.read_to_end(&mut end).await.unwrap();
        assert!(end.is_empty());
        guest.write_all(b"still here").await.unwrap();
        drop(guest);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"still here");
    }
}

#[tokio::test]
async fn what_has_been_read_of_a_connection_is_part_of_it() {
    let (services, inside) = with_tunnels();
    let (mut client, theirs) = tokio::io::duplex(1024);
    let read = format!("{TUNNEL}early").into_bytes();
    let task = tokio::spawn(async move { services.serve_stream(theirs, read, Origin::Services).await });
    exactly(&mut client, b"OK").await;
    let (_, mut guest) = loop {
        if let Some(opened) = inside.0.lock().unwrap().pop() {
            break opened;
        }
        tokio::task::yield_now().await;
    };
    exactly(&mut guest, b"early").await;
    drop((client, guest));
    task.await.unwrap();

    let services = Services::new(config(nowhere(), "one"));
    let (mut client, theirs) = tokio::io::duplex(1024);
    let read = b"GET /nothing HTT".to_vec();
    tokio::spawn(async move { services.serve_stream(theirs, read, Origin::Listen).await });
    client.write_all(b"P/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    exactly(&mut client, b"HTTP/1.1 404 Not Found\r\n").await;
}

#[tokio::test]
async fn under_a_policy_a_socket_that_a_vm_can_reach_opens_no_tunnel() {
    let is_in_force = Arc::new(AtomicBool::new(true));
    let inside = Arc::new(Inside::default());
    let services = |policy_in_force| {
        Services::new(ServicesConfig {
            tunnels: Arc::clone(&inside) as Arc<dyn Tunnels>,
            policy_in_force,
            ..config(nowhere(), "one")
        })
    };
    let known = services(as_set(&is_in_force));
    let refused = raw(&known, Origin::Listen, TUNNEL).await;
    assert!(refused.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{refused}");
    assert!(refused.ends_with("use the one of -services\n"), "{refused}");
    let unknown = services(policy_in_force(nowhere(), "one".to_owned(), false));
    let refused = raw(&unknown, Origin::Listen, TUNNEL).await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(inside.0.lock().unwrap().is_empty());
    // The host's own socket is no VM's.
    let to_nowhere = TUNNEL.replace("port=22", "port=1");
    assert_eq!(raw(&known, Origin::Services, &to_nowhere).await, "OK");
    is_in_force.store(false, Ordering::SeqCst);
    assert_eq!(raw(&known, Origin::Listen, &to_nowhere).await, "OK");
}

#[tokio::test]
async fn a_tunnel_to_nowhere_is_closed_and_wrong_parameters_are_answered() {
    let (services, _inside) = with_tunnels();
    let refused_dial = raw(&services, Origin::Services, &TUNNEL.replace("port=22", "port=1")).await;
    assert_eq!(refused_dial, "OK");
    let cases = [
        ("", "ip is mandatory"),
        (
            "?ip=192.168.127.2",
            r#"strconv.ParseUint: parsing "": invalid syntax"#,
        ),
        (
            "?ip=web&port=22",
            "ip web is not an address (expected one in the network, as 192.168.127.2)",
        ),
    ];
    for (query, text) in cases {
        let answer = post(&services, Origin::Services, &format!("/tunnel{query}"), "").await;
        assert_eq!(answer, refused(500, text));
    }
    let second = format!("GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n{TUNNEL}");
    let answer = raw(&services, Origin::Services, &second).await;
    assert!(
        answer.ends_with("as the first request of a connection alone\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn paths_that_are_not_there_are_gos_404_and_a_request_needs_a_host() {
    let services = Services::new(config(nowhere(), "one"));
    for path in [
        "/",
        "/connect",
        "/services/",
        "/services/forwarder/none",
        "/leases/",
        "/dns/all",
        "/network/",
    ] {
        let answer = get(&services, Origin::Services, path).await;
        assert_eq!(answer, refused(404, "404 page not found"), "{path}");
    }
    let answer = raw(&services, Origin::Services, "GET /nothing HTTP/1.1\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    assert!(answer.ends_with("missing required Host header\n"), "{answer}");
    let answer = raw(&services, Origin::Services, "GET /nothing HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 404 Not Found\r\n"), "{answer}");
}

#[tokio::test]
async fn a_connection_serves_request_after_request() {
    let services = Services::new(config(nowhere(), "one"));
    let mut client = connect(&services, Origin::Services);
    for _ in 0..3 {
        client
            .write_all(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"404 page not found\n") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
        assert!(answer.starts_with(b"HTTP/1.1 404 Not Found\r\n"));
    }
}

#[tokio::test]
async fn without_a_controlplane_whatever_needs_one_is_answered_503_with_what_helps() {
    let services = Services::new(config(nowhere(), "one"));
    for path in [
        "/services/forwarder/all",
        "/services/dns/all",
        "/leases",
        "/cam",
        "/stats",
        "/network/pending",
        "/network/connections",
        "/network/events",
        "/dns/pending",
        "/dns/denied",
        "/dns/allowed",
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        let answer = raw(&services, Origin::Services, &request).await;
        assert!(
            answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
            "{path}: {answer}"
        );
        assert!(
            answer.contains("X-Vnet-Remedy: start one with: vnet-controlplane"),
            "{path}: {answer}"
        );
        assert!(
            answer.ends_with("\r\n\r\nno controlplane answers at unix:///nonexistent/vnet.sock\n"),
            "{path}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_and_one_at_the_limit_is_read() {
    let services = Services::new(config(nowhere(), "one"));
    let most = " ".repeat(route::BODY_BYTES_MAX);
    let path = "/services/forwarder/expose";
    assert_eq!(
        post(&services, Origin::Services, path, &most).await,
        refused(400, "EOF")
    );
    let chunk = format!("{:x}\r\n{}\r\n", 1 << 16, " ".repeat(1 << 16));
    let chunks = format!("Transfer-Encoding: chunked\r\n\r\n{}", chunk.repeat(17));
    for rest in [format!("Content-Length: {}\r\n\r\n", 4u64 << 30), chunks] {
        let mut client = connect(&services, Origin::Services);
        let request = format!("POST {path} HTTP/1.1\r\nHost: x\r\n{rest}");
        // What is not read any more cannot be written either.
        let _ = client.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        while !answer.ends_with(b"bytes\n") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 413 Payload Too Large\r\n"),
            "{answer}"
        );
        assert!(
            answer.ends_with("the body is longer than 1048576 bytes\n"),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let services = Services::new(config(nowhere(), "one"));
    for origin in [Origin::Services, Origin::Listen] {
        let mut client = connect(&services, origin);
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nLong: ")
            .await
            .unwrap();
        // It is no longer read at some point.
        for _ in 0..64 {
            if client.write_all(&[b'x'; 4096]).await.is_err() {
                break;
            }
        }
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    for nonsense in ["\0\0\0\0\0\0", "VMN3T\x01\0\0\0", "SSH-2.0-x\r\n\r\n"] {
        let answer = raw(&services, Origin::Services, nonsense).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400 "),
            "{answer}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_does_not_arrive_within_ten_seconds_ends() {
    let services = Services::new(config(nowhere(), "one"));
    let guest = Origin::Guest(Guest {
        vm: vnet_proto::model::VmId(1),
        address: std::net::IpAddr::V4(Ipv4Addr::new(192, 168, 127, 2)),
    });
    for (origin, start) in [
        (Origin::Services, ""),
        (Origin::Services, "GET /nothing HTTP/1.1\r\nHo"),
        (guest, "GET /nothing HTTP/1.1\r\nHo"),
        (
            Origin::Services,
            "POST /services/forwarder/expose HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        ),
    ] {
        let began = tokio::time::Instant::now();
        let mut client = connect(&services, origin);
        client.write_all(start.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        let took = began.elapsed();
        assert!(
            took >= Duration::from_secs(10) && took < Duration::from_secs(25),
            "{start:?}: {took:?}"
        );
        let is_body = start.starts_with("POST");
        assert_eq!(
            answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
            is_body,
            "{start:?}: {answer}"
        );
    }
}

const NOTHING: &str = "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n";

/// A connection on which a request was answered, and nothing is under way.
async fn idle(services: &Arc<Services>, origin: Origin) -> DuplexStream {
    let mut client = connect(services, origin);
    client.write_all(NOTHING.as_bytes()).await.unwrap();
    exactly(&mut client, b"HTTP/1.1 404 Not Found\r\n").await;
    let mut rest = Vec::new();
    while !rest.ends_with(b"404 page not found\n") {
        assert_ne!(client.read_buf(&mut rest).await.unwrap(), 0);
    }
    client
}

/// One of which a request is in progress, as long as the controlplane says nothing.
async fn busy(services: &Arc<Services>, origin: Origin) -> DuplexStream {
    let places = match origin {
        Origin::Listen => &services.on_listen.connections,
        _ => &services.on_services.connections,
    };
    let before = places.busy();
    let mut client = connect(services, origin);
    client
        .write_all(b"GET /leases HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    while places.busy() == before {
        tokio::task::yield_now().await;
    }
    client
}

fn guest(last: u8) -> Origin {
    Origin::Guest(Guest {
        vm: vnet_proto::model::VmId(1),
        address: std::net::IpAddr::V4(Ipv4Addr::new(192, 168, 127, last)),
    })
}

#[tokio::test(start_paused = true)]
async fn connections_beyond_the_limit_are_told_so_and_each_kind_has_its_own() {
    let stopped = Stopped::start();
    let services = Services::new(config(stopped.connection(), "one"));
    for (origin, limit) in [
        (Origin::Listen, LISTEN_CONNECTIONS_MAX),
        (guest(2), GUEST_CONNECTIONS_MAX),
        (Origin::Services, SERVICES_CONNECTIONS_MAX),
    ] {
        let mut held = Vec::new();
        for _ in 0..limit {
            held.push(match origin {
                Origin::Guest(_) => idle(&services, origin).await,
                _ => busy(&services, origin).await,
            });
        }
        let answer = raw(&services, origin, NOTHING).await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{origin:?}: {answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{answer}"
        );
        for other in [Origin::Services, guest(3)] {
            assert_eq!(
                get(&services, other, "/nothing").await.0,
                if other == origin { 503 } else { 404 }
            );
        }
        drop(held);
        // What waits for the controlplane ends with that.
        while get(&services, origin, "/nothing").await.0 != 404 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_the_longest_idle_connection_makes_way() {
    for (origin, limit) in [
        (Origin::Services, SERVICES_CONNECTIONS_MAX),
        (Origin::Listen, LISTEN_CONNECTIONS_MAX),
    ] {
        let stopped = Stopped::start();
        let services = Services::new(config(stopped.connection(), "one"));
        // One in progress, one that says nothing, two that say half, and then as many as there may be.
        let mut working = busy(&services, origin).await;
        let mut silent = connect(&services, origin);
        let mut half = connect(&services, origin);
        half.write_all(b"GET /nothing HTTP/1.1\r\nHo").await.unwrap();
        tokio::task::yield_now().await;
        let mut half_body = connect(&services, origin);
        let head = "POST /services/forwarder/expose HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\
                    Content-Length: 9\r\n\r\n";
        half_body.write_all(head.as_bytes()).await.unwrap();
        exactly(&mut half_body, b"HTTP/1.1 100 Continue\r\n\r\n").await;
        half_body.write_all(b"{").await.unwrap();
        let mut held = Vec::new();
        for _ in 4..limit {
            held.push(idle(&services, origin).await);
        }
        for gone in [&mut silent, &mut half, &mut half_body] {
            assert_eq!(get(&services, origin, "/nothing").await.0, 404);
            assert_eq!(gone.read(&mut [0; 64]).await.unwrap(), 0);
            // Its place stays taken.
            held.push(idle(&services, origin).await);
        }
        // The oldest of the others has something to say still, and is not the longest idle any more.
        held[0].write_all(NOTHING.as_bytes()).await.unwrap();
        exactly(&mut held[0], b"HTTP/1.1 404 Not Found\r\n").await;
        assert_eq!(get(&services, origin, "/nothing").await.0, 404);
        assert_eq!(held[1].read(&mut [0; 64]).await.unwrap(), 0);
        drop(stopped);
        exactly(&mut working, b"HTTP/1.1 503 Service Unavailable\r\n").await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_controlplane_that_says_nothing_is_answered_503_with_what_to_look_at() {
    let stopped = Stopped::start();
    let services = Services::new(config(stopped.connection(), "one"));
    let began = tokio::time::Instant::now();

    let answer = raw(
        &services,
        Origin::Services,
        "GET /leases HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    .await;

    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(
        answer.contains("X-Vnet-Remedy: it may be stopped (state T in ps)"),
        "{answer}"
    );
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test]
async fn tunnels_have_a_limit_of_their_own() {
    let (services, _inside) = with_tunnels();
    let mut held = Vec::new();
    for _ in 0..TUNNELS_MAX {
        let mut client = connect(&services, Origin::Services);
        client.write_all(TUNNEL.as_bytes()).await.unwrap();
        exactly(&mut client, b"OK").await;
        held.push(client);
    }
    let answer = raw(&services, Origin::Services, TUNNEL).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert_eq!(
        get(&services, Origin::Services, "/nothing").await.0,
        404,
        "requests are served"
    );
    let mut other = connect(&services, Origin::Listen);
    other.write_all(TUNNEL.as_bytes()).await.unwrap();
    exactly(&mut other, b"OK").await;
}

#[tokio::test]
async fn a_page_from_elsewhere_changes_nothing() {
    let services = Services::new(config(nowhere(), "one"));
    let request = "POST /services/forwarder/expose HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n\
                   Origin: https://attacker.example\r\nContent-Length: 2\r\n\r\n{}";
    let answer = raw(&services, Origin::Services, request).await;
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    let own = request.replace("https://attacker.example", "http://127.0.0.1:8080");
    let answer = raw(&services, Origin::Services, &own).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    // An image or a form that is fetched has no Origin.
    for said in ["Origin: https://attacker.example", "Sec-Fetch-Site: cross-site"] {
        for path in ["/tunnel?ip=192.168.127.2&port=22", "/leases"] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:8080\r\n{said}\r\n\r\n");
            let answer = raw(&services, Origin::Services, &request).await;
            assert!(
                answer.starts_with("HTTP/1.1 403 Forbidden\r\n"),
                "{said} {path}: {answer}"
            );
        }
    }
}
