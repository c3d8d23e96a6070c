//! Forwards over real loopback sockets, with a router that records what it is handed.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::sync::mpsc;

use super::*;
use crate::descriptors::{PER_FORWARD, RESERVE_MIN};
use crate::egress::stream::HostStream;
use crate::message::Order;

/// One guest may live at each address; everything sent is recorded.
struct Recorder {
    guests: Mutex<HashMap<IpAddr, VmId>>,
    sent: Mutex<mpsc::Sender<(VmId, Input)>>,
}

impl Router for Recorder {
    fn send(&self, vm: VmId, input: Input) -> bool {
        self.sent.lock().unwrap().send((vm, input)).is_ok()
    }

    fn broadcast(&self, _order: &Order) -> Vec<VmId> {
        self.vms()
    }

    fn vms(&self) -> Vec<VmId> {
        self.guests.lock().unwrap().values().copied().collect()
    }

    fn guest_at(&self, address: IpAddr) -> Option<VmId> {
        self.guests.lock().unwrap().get(&address).copied()
    }
}

struct Given {
    forwards: Forwards,
    router: Arc<Recorder>,
    metrics: Arc<Metrics>,
    sent: mpsc::Receiver<(VmId, Input)>,
    // Last, so that it outlives what runs on it.
    _runtime: tokio::runtime::Runtime,
}

const GUEST: &str = "192.168.127.2";
const COMMAND: CommandId = CommandId(7);

fn given(guests: &[&str], limit: usize) -> Given {
    given_with(guests, limit, Descriptors::new(1 << 20))
}

fn given_with(guests: &[&str], limit: usize, descriptors: Descriptors) -> Given {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (sender, sent) = mpsc::channel();
    let guests = guests
        .iter()
        .zip(1..)
        .map(|(a, vm)| (a.parse().unwrap(), VmId(vm)))
        .collect();
    let router = Arc::new(Recorder {
        guests: Mutex::new(guests),
        sent: Mutex::new(sender),
    });
    let metrics = Arc::new(Metrics::default());
    let forwards = Forwards::with_limit(
        Arc::clone(&router) as Arc<dyn Router>,
        Arc::clone(&metrics),
        descriptors,
        runtime.handle().clone(),
        limit,
    );
    Given {
        forwards,
        router,
        metrics,
        sent,
        _runtime: runtime,
    }
}

fn forward(protocol: Protocol, listen: SocketAddr) -> Forward {
    Forward {
        protocol,
        listen,
        target: SocketAddr::new(GUEST.parse().unwrap(), 80),
    }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_forward_for_which_no_descriptor_is_left_is_refused_until_another_is_closed() {
    let descriptors = Descriptors::new(RESERVE_MIN + PER_FORWARD);
    let given = given_with(&[GUEST], 8, descriptors);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();
    let refused = given.forwards.expose(forward(Protocol::Udp, any_port()));
    assert!(
        matches!(refused, Err(ForwardError::Descriptors(_))),
        "{refused:?}"
    );
    given.forwards.unexpose(Protocol::Tcp, listen, COMMAND).unwrap();
    given.forwards.expose(forward(Protocol::Udp, any_port())).unwrap();
}

#[test]
fn a_tcp_connection_reaches_the_guest_at_the_target() {
    let given = given(&[GUEST], 8);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();

    let mut client = TcpStream::connect(listen).unwrap();
    client.write_all(b"hello").unwrap();

    let (vm, input) = given.sent.recv_timeout(PATIENCE).unwrap();
    let Input::Ingress(Ingress {
        stream: HostStream::Tcp(mut stream),
        target,
        ..
    }) = input
    else {
        panic!("{input:?}")
    };
    assert_eq!(vm, VmId(1));
    assert_eq!(target, "192.168.127.2:80".parse().unwrap());
    stream.set_nonblocking(false).unwrap();
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
    // Counted by another thread, once it has handed the connection over.
    let until = std::time::Instant::now() + PATIENCE;
    while given.metrics.forward_connections.get() != 1 && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    assert_eq!(given.metrics.forward_connections.get(), 1);
}

#[test]
fn without_a_guest_the_client_sees_a_reset() {
    let given = given(&[], 8);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();

    let mut client = TcpStream::connect(listen).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let error = client.read(&mut [0; 1]).unwrap_err();

    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(
        given.metrics.forward_refusals.of(ForwardRefusal::NoGuest).get(),
        1
    );
}

#[test]
fn connections_that_wait_for_a_stuck_driver_are_bounded() {
    let given = given(&[GUEST], 8);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();

    let clients: Vec<_> = (0..=CONNECTIONS_WAITING_MAX)
        .map(|_| TcpStream::connect(listen).unwrap())
        .collect();
    let mut held: Vec<_> = (0..CONNECTIONS_WAITING_MAX)
        .map(|_| given.sent.recv_timeout(PATIENCE).unwrap())
        .collect();
    let mut last = clients.last().unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(
        last.read(&mut [0; 1]).unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
    assert_eq!(
        given.metrics.forward_refusals.of(ForwardRefusal::Backlog).get(),
        1
    );

    // One is taken on: there is room for one more.
    held.pop();
    let _next = TcpStream::connect(listen).unwrap();
    given.sent.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn a_udp_socket_is_handed_over_and_again_when_the_guest_comes_back() {
    let given = given(&[], 8);
    let listen = given.forwards.expose(forward(Protocol::Udp, any_port())).unwrap();
    assert!(given.sent.try_recv().is_err(), "nobody to hand it to");

    for vm in [VmId(4), VmId(5)] {
        given
            .forwards
            .guest_attached(vm, "192.168.127.9".parse().unwrap());
        given.forwards.guest_attached(vm, GUEST.parse().unwrap());
        let (to, input) = given.sent.recv_timeout(PATIENCE).unwrap();
        let Input::IngressUdp {
            listen: identity,
            socket,
            target,
        } = input
        else {
            panic!("{input:?}")
        };
        assert_eq!((to, identity, target.port()), (vm, listen, 80));
        let client = UdpSocket::bind(any_port()).unwrap();
        client.send_to(b"ping", listen).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(
            socket.recv_from(&mut buffer).unwrap(),
            (4, client.local_addr().unwrap())
        );
    }
}

#[test]
fn a_port_in_use_is_refused_and_a_closed_one_is_free_at_once() {
    let given = given(&[GUEST], 8);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();

    let error = given.forwards.expose(forward(Protocol::Tcp, listen)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("tcp {listen} is already in use; close what listens there or forward another port")
    );
    for _ in 0..20 {
        given.forwards.unexpose(Protocol::Tcp, listen, COMMAND).unwrap();
        assert_eq!(
            given.forwards.expose(forward(Protocol::Tcp, listen)).unwrap(),
            listen
        );
    }
    assert_eq!(given.forwards.list(), [forward(Protocol::Tcp, listen)]);
}

#[test]
fn closing_tells_every_guest_to_cut_its_flows() {
    let given = given(&[GUEST, "192.168.127.3"], 8);
    let listen = given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();

    let (closed, mut asked) = given.forwards.unexpose(Protocol::Tcp, listen, COMMAND).unwrap();

    let mut told: Vec<VmId> = given
        .sent
        .try_iter()
        .filter(|(_, input)| matches!(input, Input::IngressClosed { command: COMMAND, udp: false, listen: l } if *l == listen))
        .map(|(vm, _)| vm)
        .collect();
    told.sort_unstable();
    assert_eq!(told, [VmId(1), VmId(2)]);
    asked.sort_unstable();
    assert_eq!((closed, asked), (forward(Protocol::Tcp, listen), told));
    assert!(TcpStream::connect(listen).is_err());
    assert!(matches!(
        given.forwards.unexpose(Protocol::Tcp, listen, COMMAND),
        Err(ForwardError::NotFound { .. })
    ));
}

#[test]
fn the_limit_of_forwards_holds() {
    let given = given(&[GUEST], 2);
    given.forwards.expose(forward(Protocol::Tcp, any_port())).unwrap();
    given.forwards.expose(forward(Protocol::Udp, any_port())).unwrap();
    let error = given
        .forwards
        .expose(forward(Protocol::Tcp, any_port()))
        .unwrap_err();
    assert_eq!(error.to_string(), "2 forwards are open already; close one first");
    assert_eq!(given.metrics.forwards_open.get(), 2);
    assert_eq!(given.router.vms(), [VmId(1)]);
}

#[test]
fn what_cannot_be_forwarded_is_refused() {
    let given = given(&[GUEST], 8);
    let refused = |forward| given.forwards.expose(forward).unwrap_err().to_string();

    assert_eq!(
        refused(forward(Protocol::Icmp, any_port())),
        "icmp cannot be forwarded (expected tcp or udp)"
    );
    assert_eq!(
        refused(Forward {
            target: "192.168.127.2:0".parse().unwrap(),
            ..forward(Protocol::Tcp, any_port())
        }),
        "192.168.127.2:0 is not a place in the network (expected a unicast address and a port other than 0)"
    );
    assert_eq!(
        refused(forward(Protocol::Tcp, "192.0.2.1:8080".parse().unwrap())),
        "192.0.2.1:8080 is not an address of this host"
    );
    assert!(given.forwards.list().is_empty());
}
