//! Requests over real sockets, with an entrance and a router that record what they are handed.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use vnet_proto::model::VmId;

use super::*;
use crate::front::{self, FrontReceiver};
use crate::message::{Ingress, Input, Order, Origin, Router};
use crate::metrics::{FrontRefusal, TunnelRefusal};

const PATIENCE: Duration = Duration::from_secs(10);
const GUEST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 127, 2));
const CONNECT: &[u8] = b"POST /connect HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\n\r\n";

struct Guests(Mutex<Sender<(HostStream, Vec<u8>)>>);

impl Entrance for Guests {
    fn attach(&self, stream: HostStream, _: Option<Cid>, early: &[u8]) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send((stream, early.to_vec())).unwrap();
    }
}

/// Who is there, and whether nothing is said of it.
struct OneGuest(Mutex<Sender<Input>>, Arc<AtomicBool>);

impl Router for OneGuest {
    fn send(&self, _vm: VmId, input: Input) -> bool {
        self.0.lock().unwrap().send(input).is_ok()
    }

    fn broadcast(&self, _order: &Order) -> Vec<VmId> {
        Vec::new()
    }

    fn vms(&self) -> Vec<VmId> {
        vec![VmId(1)]
    }

    fn guest_at(&self, address: IpAddr) -> Option<VmId> {
        (address == GUEST).then_some(VmId(1))
    }

    fn seek(&self, _address: IpAddr) -> bool {
        false
    }

    fn is_open(&self) -> bool {
        self.1.load(Ordering::Relaxed)
    }
}

struct Given {
    requests: Requests,
    guests: Receiver<(HostStream, Vec<u8>)>,
    tunnels: Receiver<Input>,
    open: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

fn given(front: Option<FrontSender>) -> Given {
    given_with(front, HEAD_PATIENCE)
}

fn given_with(front: Option<FrontSender>, head_patience: Duration) -> Given {
    let (guest, guests) = channel();
    let (tunnel, tunnels) = channel();
    let metrics: Arc<Metrics> = Arc::default();
    let descriptors = Descriptors::new(1 << 20);
    let open = Arc::new(AtomicBool::new(true));
    let router = Arc::new(OneGuest(Mutex::new(tunnel), Arc::clone(&open)));
    let mut requests = Requests::new(
        "unix:///run/network.sock".to_owned(),
        Box::new(Guests(Mutex::new(guest))),
        Tunnels::new(router, Arc::clone(&metrics), &descriptors),
        front,
        &descriptors,
        1,
        Arc::clone(&metrics),
    );
    Arc::get_mut(&mut requests.0).unwrap().head_patience = head_patience;
    Given {
        requests,
        guests,
        tunnels,
        open,
        metrics,
    }
}

impl Given {
    /// A client that has said this.
    fn client(&self, said: &[u8]) -> UnixStream {
        let (mut client, there) = UnixStream::pair().unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(said).unwrap();
        self.requests.begin(there.into(), None);
        client
    }

    /// Everything that it is answered, up to the end.
    fn answer(&self, said: &[u8]) -> String {
        rest(&mut self.client(said))
    }

    fn refusals(&self, cause: RequestRefusal) -> u64 {
        self.metrics.request_refusals.of(cause).get()
    }

    fn guest(&self) -> (UnixStream, Vec<u8>) {
        let (stream, early) = self.guests.recv_timeout(PATIENCE).unwrap();
        (unix(stream), early)
    }

    fn ingress(&self) -> Ingress {
        match self.tunnels.recv_timeout(PATIENCE).unwrap() {
            Input::Ingress(ingress) => ingress,
            other => panic!("{other:?}"),
        }
    }
}

fn unix(stream: HostStream) -> UnixStream {
    match stream {
        HostStream::Unix(stream) => {
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        }
        HostStream::Tcp(stream) => panic!("{stream:?}"),
    }
}

fn rest(client: &mut UnixStream) -> String {
    let mut read = String::new();
    client.read_to_string(&mut read).unwrap();
    read
}

fn front_pair() -> (FrontSender, FrontReceiver, Arc<Metrics>) {
    let (one, other) = front::pair().unwrap();
    let metrics: Arc<Metrics> = Arc::default();
    let (sender, _) = front::open(one, Arc::clone(&metrics)).unwrap();
    let (_, receiver) = front::open(other, Arc::default()).unwrap();
    (sender, receiver, metrics)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_let_in_without_a_word_and_what_came_with_its_request_is_kept() {
    let given = given(None);
    let mut client = given.client(&[CONNECT, b"\x05\0frame"].concat());
    let (mut stream, early) = given.guest();
    assert_eq!(early, b"\x05\0frame");
    client.write_all(b"\x01\0x").unwrap();
    let mut next = [0; 3];
    stream.read_exact(&mut next).unwrap();
    assert_eq!(&next, b"\x01\0x");
    stream.write_all(b"first").unwrap();
    drop(stream);
    assert_eq!(rest(&mut client), "first", "no answer came before");
    assert_eq!(given.metrics.requests.get(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_is_ok_and_leads_into_the_network_with_what_came_early() {
    let given = given(None);
    let said = b"POST /tunnel?ip=192.168.127.2&port=22 HTTP/1.1\r\nHost: unix\r\n\r\nSSH-2.0-x\r\n";
    let mut client = given.client(said);
    let ingress = given.ingress();
    assert_eq!(ingress.target, SocketAddr::new(GUEST, 22));
    assert_eq!(ingress.early, b"SSH-2.0-x\r\n");
    assert_eq!(ingress.origin, Origin::Tunnel);
    let mut stream = unix(ingress.stream);
    stream.write_all(b" there").unwrap();
    drop(stream);
    assert_eq!(rest(&mut client), "OK there");
    assert_eq!(given.metrics.tunnels.get(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_to_nobody_is_ok_and_closed_and_one_without_a_place_is_told() {
    let given = given(None);
    for ip in ["192.168.127.3", "192.168.127.1", "127.0.0.1", "203.0.113.9"] {
        let said = format!("GET /tunnel?ip={ip}&port=22 HTTP/1.0\r\n\r\n");
        assert_eq!(given.answer(said.as_bytes()), "OK");
    }
    let refusals = &given.metrics.tunnel_refusals;
    assert_eq!(refusals.of(TunnelRefusal::NoGuest).get(), 4);

    let answer = given.answer(b"POST /tunnel HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(
        answer.starts_with("HTTP/1.1 500 Internal Server Error\r\n"),
        "{answer}"
    );
    assert!(answer.ends_with("\r\n\r\nip is mandatory\n"), "{answer}");
    assert_eq!(given.refusals(RequestRefusal::Tunnel), 1);
    assert!(given.tunnels.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_guest_is_under_a_policy_no_tunnel_passes_by_it() {
    let given = given(None);
    let said = b"POST /tunnel?ip=192.168.127.2&port=22 HTTP/1.1\r\nHost: unix\r\n\r\n";
    given.open.store(false, Ordering::Relaxed);
    let answer = given.answer(said);
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{answer}");
    assert!(
        answer.ends_with(
            "\r\n\r\na policy or mode is in force, so no tunnel on a socket that a VM can reach: use a forward, or \
             -services\n"
        ),
        "{answer}"
    );
    assert_eq!(given.refusals(RequestRefusal::Policy), 1);
    assert!(given.tunnels.try_recv().is_err());
    // Guests are let in all the same.
    let _client = given.client(CONNECT);
    given.guest();
    given.open.store(true, Ordering::Relaxed);
    let _client = given.client(said);
    given.ingress();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_front_every_other_path_is_not_found() {
    let given = given(None);
    let answer = given.answer(b"GET /services/forwarder/all HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\n"));
    assert!(
        answer.contains("\r\nX-Content-Type-Options: nosniff\r\n"),
        "{answer}"
    );
    assert!(answer.contains("\r\nContent-Length: 19\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n404 page not found\n"), "{answer}");
    let head = given.answer(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    assert_eq!(given.refusals(RequestRefusal::NotFound), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_front_it_has_the_connection_and_everything_that_was_read() {
    let (sender, mut receiver, _) = front_pair();
    let given = given(Some(sender));
    let said = b"POST /services/dns/add HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{\"Nam";
    let mut client = given.client(said);
    let (message, stream) = receiver.receive().await.unwrap();
    let expected = FrontMessage::Services {
        listen: "unix:///run/network.sock".to_owned(),
        read: said.to_vec(),
    };
    assert_eq!(message, expected);
    let mut stream = unix(stream);
    client.write_all(b"e\":0").unwrap();
    let mut body = [0; 4];
    stream.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"e\":0");
    stream.write_all(b"answer").unwrap();
    drop(stream);
    assert_eq!(rest(&mut client), "answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_head_reaches_the_front() {
    let (sender, mut receiver, _) = front_pair();
    let given = given(Some(sender));
    let mut said = b"GET / HTTP/1.1\r\nHost: a\r\nX: ".to_vec();
    said.resize(HEAD_BYTES_MAX - 4, b'x');
    said.extend_from_slice(b"\r\n\r\n");
    let _client = given.client(&said);
    let (message, _) = receiver.receive().await.unwrap();
    assert!(matches!(message, FrontMessage::Services { read, .. } if read == said));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_front_that_takes_nothing_costs_only_its_own_requests() {
    let (one, other) = front::pair().unwrap();
    let metrics: Arc<Metrics> = Arc::default();
    let (sender, _) = front::open(one, Arc::clone(&metrics)).unwrap();
    let given = given(Some(sender));
    let mut waiting = Vec::new();
    // The queue of the system first, then our own.
    while given.refusals(RequestRefusal::Front) == 0 {
        waiting.push(given.client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert!(waiting.len() < 4_096);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // Each is counted where it is refused, and then as a request.
    let until = Instant::now() + PATIENCE;
    while metrics.front_refusals.of(FrontRefusal::Full).get() != given.refusals(RequestRefusal::Front) {
        assert!(Instant::now() < until, "they are the same");
        tokio::task::yield_now().await;
    }
    let _client = given.client(CONNECT);
    given.guest();
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_is_told_so() {
    let given = given(None);
    for (said, status, cause) in [
        (
            &b"\x01\x02\x03\n"[..],
            "400 Bad Request",
            RequestRefusal::Malformed,
        ),
        (
            b"GET /connect HTTP/1.1\r\n\r\n",
            "400 Bad Request",
            RequestRefusal::Malformed,
        ),
        (
            b"POST /connect HTTP/1.1\r\nHost: a\r\nOrigin: http://page.test\r\n\r\n",
            "403 Forbidden",
            RequestRefusal::Browser,
        ),
        (
            &[b'x'; HEAD_BYTES_MAX + 1_000],
            "431 Request Header Fields Too Large",
            RequestRefusal::TooLong,
        ),
    ] {
        let before = given.refusals(cause);
        let answer = given.answer(said);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{answer}");
        assert_eq!(answer.matches('\n').count(), 8, "a line of text: {answer}");
        assert_eq!(given.refusals(cause), before + 1);
    }
    let mut half = given.client(b"POST /conn");
    half.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(rest(&mut half).ends_with("the request broke off\n"));
    assert_eq!(given.answer_of_nothing(), "");
}

impl Given {
    /// Of a client that says nothing and finishes.
    fn answer_of_nothing(&self) -> String {
        let mut client = self.client(b"");
        client.shutdown(std::net::Shutdown::Write).unwrap();
        rest(&mut client)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_does_not_come_is_not_waited_for() {
    let given = given_with(None, Duration::from_millis(20));
    let answer = given.answer(b"POST /connect HTTP/1.1\r\nHost: ");
    assert!(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n"), "{answer}");
    assert_eq!(given.refusals(RequestRefusal::TooSlow), 1);
    assert!(given.guests.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_who_say_nothing_or_half_delay_nobody() {
    let given = given(None);
    let mut idle: Vec<UnixStream> = (0..HEADS_MAX)
        .map(|n| {
            given.client(if n % 2 == 0 {
                b""
            } else {
                b"POST /connect HTTP/1.1\r\n"
            })
        })
        .collect();
    let _client = given.client(CONNECT);
    given.guest();
    // One had to make way for it; the one that had waited longest.
    assert!(rest(&mut idle[0]).starts_with("HTTP/1.1 503 Service Unavailable\r\n"));
    while given.requests.0.heads.reading() >= HEADS_MAX {
        tokio::task::yield_now().await;
    }
    idle.push(given.client(b""));
    for n in 1..=72 {
        idle.push(given.client(b""));
        assert!(
            rest(&mut idle[n]).starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
            "{n}"
        );
    }
    assert_eq!(given.refusals(RequestRefusal::Crowded), 73);
    idle[73]
        .set_read_timeout(Some(Duration::from_millis(10)))
        .unwrap();
    let error = idle[73].read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "the others still wait");
    idle[75].write_all(b"Host: \r\n\r\n").unwrap();
    given.guest();
}
