//! Forwards over real loopback sockets, with a router that records what it is handed.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::descriptors::{PER_FORWARD, RESERVE_MIN};
use crate::egress::stream::HostStream;
use crate::message::{Ingress, Order, Origin};

/// One guest may live at each address; everything sent is recorded.
struct Recorder {
    /// What guests were asked for, if there are any.
    asked: Option<Mutex<Vec<IpAddr>>>,
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

    fn seek(&self, address: IpAddr) -> bool {
        let asked = self.asked.as_ref();
        asked.is_some_and(|asked| {
            asked.lock().unwrap().push(address);
            true
        })
    }

    fn is_open(&self) -> bool {
        false
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
    given_all(guests, limit, descriptors, false)
}

fn given_all(guests: &[&str], limit: usize, descriptors: Descriptors, guests_are_there: bool) -> Given {
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
        asked: guests_are_there.then(Mutex::default),
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
    at(protocol, &listen.to_string())
}

fn at(protocol: Protocol, listen: &str) -> Forward {
    Forward {
        protocol,
        listen: listen.parse().unwrap(),
        target: SocketAddr::new(GUEST.parse().unwrap(), 80),
        keep_client: false,
        asked_by: String::new(),
        grant_id: String::new(),
    }
}

impl Given {
    fn open(&self, forward: Forward) -> SocketAddr {
        match self.forwards.expose(vec![forward]).unwrap().remove(0).listen {
            ForwardListen::Address(address) => address,
            unix => panic!("{unix}"),
        }
    }

    fn refusal(&self, forward: Forward) -> String {
        self.forwards.expose(vec![forward]).unwrap_err().to_string()
    }

    fn shut(&self, forward: &Forward) -> Result<(Vec<Forward>, Vec<VmId>), ForwardError> {
        let wanted = [(forward.protocol, forward.listen.clone())];
        self.forwards.unexpose(&wanted, COMMAND)
    }

    fn ingress(&self) -> (VmId, Ingress) {
        match self.sent.recv_timeout(PATIENCE).unwrap() {
            (vm, Input::Ingress(ingress)) => (vm, ingress),
            other => panic!("{other:?}"),
        }
    }
}

/// A directory of a test's own, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vnet-forward-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn forward(&self, name: &str) -> Forward {
        at(Protocol::Tcp, &format!("unix://{}", self.path(name).display()))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
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
    let listen = given.open(forward(Protocol::Tcp, any_port()));
    let refused = given.forwards.expose(vec![forward(Protocol::Udp, any_port())]);
    assert!(
        matches!(refused, Err(ForwardError::Descriptors(_))),
        "{refused:?}"
    );
    given.shut(&forward(Protocol::Tcp, listen)).unwrap();
    given.open(forward(Protocol::Udp, any_port()));
}

#[test]
fn a_tcp_connection_reaches_the_guest_at_the_target() {
    let given = given(&[GUEST], 8);
    let listen = given.open(forward(Protocol::Tcp, any_port()));

    let mut client = TcpStream::connect(listen).unwrap();
    client.write_all(b"hello").unwrap();

    let (vm, ingress) = given.ingress();
    let Ingress {
        stream: HostStream::Tcp(mut stream),
        target,
        client: None,
        origin: Origin::Forward(_),
        ..
    } = ingress
    else {
        panic!("{ingress:?}")
    };
    assert_eq!(vm, VmId(1));
    assert_eq!(target, "192.168.127.2:80".parse().unwrap());
    stream.set_nonblocking(false).unwrap();
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");
    assert_eq!(given.metrics.forward_connections.get(), 1);
}

/// Forwards of a network that has guests, of which none has shown its address.
fn given_shy() -> Given {
    given_all(&[], 8, Descriptors::new(1 << 20), true)
}

impl Given {
    fn shows(&self, address: &str) {
        let mut guests = self.router.guests.lock().unwrap();
        guests.insert(address.parse().unwrap(), VmId(7));
    }

    fn is_asked(&self, for_what: &str) {
        let began = std::time::Instant::now();
        let address: IpAddr = for_what.parse().unwrap();
        while !self
            .router
            .asked
            .as_ref()
            .unwrap()
            .lock()
            .unwrap()
            .contains(&address)
        {
            assert!(began.elapsed() < PATIENCE, "nobody asks for {address}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn a_guest_that_never_showed_its_address_is_asked_for_it_and_then_served() {
    let given = given_shy();
    let listen = given.open(forward(Protocol::Tcp, any_port()));
    let _client = TcpStream::connect(listen).unwrap();
    given.is_asked(GUEST);
    given.shows(GUEST);
    let (vm, ingress) = given.ingress();
    assert_eq!((vm, ingress.target.ip()), (VmId(7), GUEST.parse().unwrap()));
    assert_eq!(given.metrics.forward_connections.get(), 1);
    assert_eq!(
        given.metrics.forward_refusals.of(ForwardRefusal::NoGuest).get(),
        0
    );
}

#[test]
fn a_forward_that_is_closed_while_its_guest_is_sought_lets_nobody_in() {
    let given = given_shy();
    let wanted = forward(Protocol::Tcp, any_port());
    let listen = given.open(wanted.clone());
    let mut client = TcpStream::connect(listen).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    given.is_asked(GUEST);
    given.shut(&forward(Protocol::Tcp, listen)).unwrap();
    given.shows(GUEST);
    let error = client.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(given.metrics.forward_refusals.of(ForwardRefusal::Closed).get(), 1);
    assert_eq!(given.metrics.forward_connections.get(), 0);
}

#[test]
fn a_datagram_for_a_guest_that_nobody_knows_has_it_asked_for() {
    let given = given_shy();
    let quiet = at(Protocol::Udp, "127.0.0.1:0");
    let listen = given.open(quiet);
    assert!(given.forwards.shared.seek_for_datagrams(), "the task goes on");
    assert!(given.router.asked.as_ref().unwrap().lock().unwrap().is_empty());
    let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    client.send_to(b"x", listen).unwrap();
    given.is_asked(GUEST);
    given.shows(GUEST);
    given.forwards.guest_attached(VmId(7), GUEST.parse().unwrap());
    assert!(matches!(
        given.sent.recv_timeout(PATIENCE),
        Ok((VmId(7), Input::IngressUdp { .. }))
    ));
    // The task is over once no such forward is open.
    given.shut(&forward(Protocol::Udp, listen)).unwrap();
    let began = std::time::Instant::now();
    while given.forwards.shared.lock().looks_after_datagrams {
        assert!(began.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn without_a_guest_the_client_sees_a_reset() {
    let given = given(&[], 8);
    let listen = given.open(forward(Protocol::Tcp, any_port()));

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
    let listen = given.open(forward(Protocol::Tcp, any_port()));

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
    let listen = given.open(forward(Protocol::Udp, any_port()));
    assert!(given.sent.try_recv().is_err(), "nobody to hand it to");

    for vm in [VmId(4), VmId(5)] {
        given
            .forwards
            .guest_attached(vm, "192.168.127.9".parse().unwrap());
        given.forwards.guest_attached(vm, GUEST.parse().unwrap());
        let (to, input) = given.sent.recv_timeout(PATIENCE).unwrap();
        let Input::IngressUdp {
            forward,
            socket,
            target,
            keep_client: false,
            held,
        } = input
        else {
            panic!("{input:?}")
        };
        assert_eq!((to, forward, target.port()), (vm, ForwardId(1), 80));
        // However often it asks for its address.
        for _ in 0..10 {
            given.forwards.guest_attached(vm, GUEST.parse().unwrap());
        }
        assert!(given.sent.try_recv().is_err(), "it has the socket");
        let client = UdpSocket::bind(any_port()).unwrap();
        client.send_to(b"ping", listen).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(
            socket.recv_from(&mut buffer).unwrap(),
            (4, client.local_addr().unwrap())
        );
        drop(held);
        given.forwards.guest_attached(vm, GUEST.parse().unwrap());
        let (to, _) = given.sent.recv_timeout(PATIENCE).unwrap();
        assert_eq!(to, vm, "it has it no more");
    }
}

#[test]
fn a_client_that_is_to_be_kept_is_told_with_its_connection() {
    let given = given(&[GUEST], 8);
    let keeping = |protocol| Forward {
        keep_client: true,
        ..forward(protocol, any_port())
    };
    let listen = given.open(keeping(Protocol::Tcp));
    let client = TcpStream::connect(listen).unwrap();
    let (_, ingress) = given.ingress();
    assert_eq!(ingress.client, Some(client.local_addr().unwrap()));

    given.open(keeping(Protocol::Udp));
    let (_, input) = given.sent.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(
        input,
        Input::IngressUdp {
            keep_client: true,
            ..
        }
    ));
}

#[test]
fn a_port_in_use_is_refused_by_whose_it_is_and_a_closed_one_is_free_at_once() {
    let given = given(&[GUEST], 8);
    let listen = given.open(forward(Protocol::Tcp, any_port()));

    assert_eq!(
        given.refusal(forward(Protocol::Tcp, listen)),
        format!(
            "tcp {listen} is already in use by this network's forward from {listen} to 192.168.127.2:80; \
             close what listens there or forward another port"
        )
    );
    for _ in 0..20 {
        given.shut(&forward(Protocol::Tcp, listen)).unwrap();
        assert_eq!(given.open(forward(Protocol::Tcp, listen)), listen);
    }
    assert_eq!(given.forwards.list(), [forward(Protocol::Tcp, listen)]);
}

/// Who the text says has a place; only Linux tells.
fn by_this_process() -> String {
    if !cfg!(target_os = "linux") {
        return String::new();
    }
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    format!(" by {} (pid {})", name.trim(), std::process::id())
}

#[test]
fn a_program_that_has_the_port_or_the_socket_is_named_where_the_system_tells() {
    let given = given(&[GUEST], 8);
    let in_use = |protocol, listen: String| {
        let by = by_this_process();
        format!("{protocol} {listen} is already in use{by}; close what listens there or forward another port")
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = listener.local_addr().unwrap();
    let everywhere = SocketAddr::from(([0, 0, 0, 0], listen.port()));
    for listen in [listen, everywhere] {
        let found = given.refusal(forward(Protocol::Tcp, listen));
        assert_eq!(found, in_use("tcp", listen.to_string()));
    }
    let both = TcpListener::bind("[::]:0").unwrap();
    let listen = SocketAddr::from(([127, 0, 0, 1], both.local_addr().unwrap().port()));
    let found = given.refusal(forward(Protocol::Tcp, listen));
    assert_eq!(found, in_use("tcp", listen.to_string()), "of both families");
    let socket = UdpSocket::bind("[::1]:0").unwrap();
    let listen = socket.local_addr().unwrap();
    let found = given.refusal(forward(Protocol::Udp, listen));
    assert_eq!(found, in_use("udp", listen.to_string()));

    let directory = Directory::new("served");
    let path = directory.path("a.sock");
    let _served = UnixListener::bind(&path).unwrap();
    let found = given.refusal(directory.forward("a.sock"));
    let of_a_path =
        in_use("tcp", format!("unix://{}", path.display())).replace("another port", "from another path");
    assert_eq!(found, of_a_path);
    assert!(UnixStream::connect(&path).is_ok(), "it is served as before");
    assert!(given.forwards.list().is_empty());
}

#[test]
fn every_ipv6_address_and_every_ipv4_address_are_two_places() {
    let given = given(&[GUEST], 8);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let six = given.open(at(protocol, "[::]:0"));
        let four = SocketAddr::from(([0, 0, 0, 0], six.port()));
        assert_eq!(given.open(forward(protocol, four)), four);
        assert!(
            given
                .refusal(at(protocol, &format!("[::1]:{}", six.port())))
                .contains(&format!("by this network's forward from {six} to"))
        );
    }
    assert_eq!(given.forwards.list().len(), 4);
}

#[test]
fn a_unix_socket_leads_to_the_guest_is_the_users_alone_and_goes_with_its_forward() {
    let given = given(&[GUEST], 8);
    let directory = Directory::new("leads");
    let (wanted, path) = (directory.forward("web.sock"), directory.path("web.sock"));
    assert_eq!(
        given.forwards.expose(vec![wanted.clone()]).unwrap(),
        std::slice::from_ref(&wanted)
    );
    let mode = std::fs::symlink_metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"hello").unwrap();
    let (vm, ingress) = given.ingress();
    let HostStream::Unix(mut stream) = ingress.stream else {
        panic!("{ingress:?}")
    };
    assert_eq!((vm, ingress.client), (VmId(1), None));
    stream.set_nonblocking(false).unwrap();
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"hello");

    assert_eq!(given.shut(&wanted).unwrap().0, std::slice::from_ref(&wanted));
    assert!(!path.exists());
    // And at the end of all.
    given.forwards.expose(vec![wanted]).unwrap();
    assert!(path.exists());
    given.forwards.close();
    assert!(!path.exists());
    assert!(given.forwards.list().is_empty());
}

#[test]
fn without_a_guest_the_client_of_a_unix_socket_sees_its_end() {
    let given = given(&[], 8);
    let directory = Directory::new("alone");
    given
        .forwards
        .expose(vec![directory.forward("web.sock")])
        .unwrap();
    let mut client = UnixStream::connect(directory.path("web.sock")).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn nothing_is_ever_removed_but_a_socket_that_nobody_serves() {
    let given = given(&[GUEST], 8);
    let directory = Directory::new("removes");
    let url = |path: &Path| format!("unix://{}", path.display());
    let refused = |name: &str, found: &str| {
        let path = directory.path(name);
        assert_eq!(
            given.refusal(directory.forward(name)),
            format!(
                "{} is there already and {found}; it is left as it is: move it away or listen elsewhere",
                url(&path)
            )
        );
        assert!(std::fs::symlink_metadata(&path).is_ok(), "{name}");
    };
    std::fs::write(directory.path("file"), "precious").unwrap();
    refused("file", "is a file");
    assert_eq!(
        std::fs::read_to_string(directory.path("file")).unwrap(),
        "precious"
    );
    std::fs::create_dir(directory.path("directory")).unwrap();
    refused("directory", "is a directory");
    // Not even one that leads to a socket that nobody serves.
    drop(UnixListener::bind(directory.path("stale")).unwrap());
    symlink(directory.path("stale"), directory.path("link")).unwrap();
    refused("link", "is a symbolic link");
    let fifo = directory.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused("fifo", "is no socket");

    given.forwards.expose(vec![directory.forward("stale")]).unwrap();
    assert!(UnixStream::connect(directory.path("stale")).is_ok());
    // What somebody has put in the place of a forward's socket stays.
    let stale = directory.path("stale");
    std::fs::remove_file(&stale).unwrap();
    std::fs::write(&stale, "mine").unwrap();
    given.shut(&directory.forward("stale")).unwrap();
    assert_eq!(std::fs::read_to_string(&stale).unwrap(), "mine");

    assert_eq!(
        given.refusal(directory.forward("nowhere/a.sock")),
        format!(
            "{} cannot be made, as its directory is not there; make it or listen elsewhere",
            url(&directory.path("nowhere/a.sock"))
        )
    );
}

#[test]
fn of_several_forwards_all_are_opened_or_none() {
    let given = given(&[GUEST], 8);
    let directory = Directory::new("several");
    // Five ports in a row that are free, as far as this test can know.
    let first = (20_000..30_000)
        .step_by(5)
        .find(|first| (*first..first + 5).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()))
        .unwrap();
    let wanted = range(&at(Protocol::Tcp, &format!("127.0.0.1:{first}")), 5).unwrap();
    let in_the_way = TcpListener::bind(("127.0.0.1", first + 3)).unwrap();
    let mut with_socket = wanted.clone();
    with_socket.insert(0, directory.forward("web.sock"));

    let error = given.forwards.expose(with_socket).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("tcp 127.0.0.1:{} is already in use", first + 3)),
        "{error}"
    );
    assert!(given.forwards.list().is_empty());
    assert_eq!(given.metrics.forwards_open.get(), 0);
    assert!(!directory.path("web.sock").exists());
    for port in [first, first + 1, first + 2, first + 4] {
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok(), "{port} is free");
    }
    drop(in_the_way);

    let opened = given.forwards.expose(wanted.clone()).unwrap();
    assert_eq!(opened, wanted);
    assert_eq!(opened[4].target.port(), 84, "the ports of both sides go together");
    let error = given
        .forwards
        .expose(range(&at(Protocol::Udp, &format!("127.0.0.1:{first}")), 4).unwrap())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "5 forwards are open, and 8 may be; close some first"
    );

    // Closed together as well: one that is not there keeps the others open.
    let key = |forward: &Forward| (forward.protocol, forward.listen.clone());
    let mut keys: Vec<_> = opened.iter().map(key).collect();
    keys.push((Protocol::Udp, opened[0].listen.clone()));
    let error = given.forwards.unexpose(&keys, COMMAND).unwrap_err();
    assert!(matches!(
        error,
        ForwardError::NotFound {
            protocol: Protocol::Udp,
            ..
        }
    ));
    assert_eq!(given.forwards.list().len(), 5);
    keys.pop();
    assert_eq!(given.forwards.unexpose(&keys, COMMAND).unwrap().0, wanted);
    let told: Vec<_> = given.sent.try_iter().collect();
    assert!(
        matches!(&told[..], [(VmId(1), Input::IngressClosed { forwards, .. })] if forwards.len() == 5),
        "{told:?}"
    );
}

#[test]
fn a_range_has_ports_on_both_sides_and_no_more_than_may_be_open() {
    let first = at(Protocol::Tcp, "127.0.0.1:64512");
    assert_eq!(range(&first, 1024).unwrap().len(), 1024);
    for (listen, count) in [
        ("127.0.0.1:64512", 0),
        ("127.0.0.1:64512", 1025),
        ("127.0.0.1:64512", u32::MAX),
        ("127.0.0.1:65535", 2),
        ("127.0.0.1:0", 2),
        ("unix:///run/web.sock", 2),
    ] {
        let error = range(&at(Protocol::Tcp, listen), count).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{count} ports from {listen} on to 192.168.127.2:80 on is no range (expected 1 to 1024, all below \
                 65536, and a first port other than 0)"
            )
        );
    }
}

#[test]
fn closing_tells_every_guest_to_cut_its_flows() {
    let given = given(&[GUEST, "192.168.127.3"], 8);
    let listen = given.open(forward(Protocol::Tcp, any_port()));

    let (closed, mut asked) = given.shut(&forward(Protocol::Tcp, listen)).unwrap();

    let mut told: Vec<VmId> = given
        .sent
        .try_iter()
        .filter(|(_, input)| {
            matches!(input, Input::IngressClosed { command: COMMAND, forwards } if **forwards == [ForwardId(1)])
        })
        .map(|(vm, _)| vm)
        .collect();
    told.sort_unstable();
    assert_eq!(told, [VmId(1), VmId(2)]);
    asked.sort_unstable();
    assert_eq!((closed, asked), (vec![forward(Protocol::Tcp, listen)], told));
    assert!(TcpStream::connect(listen).is_err());
    assert!(matches!(
        given.shut(&forward(Protocol::Tcp, listen)),
        Err(ForwardError::NotFound { .. })
    ));
}

#[test]
fn a_guest_is_not_waited_with_while_a_forward_is_bound() {
    let given = given(&[GUEST], 8);
    let directory = Directory::new("binds");
    let (wanted, path) = (directory.forward("web.sock"), directory.path("web.sock"));
    // Whoever has the table, as a driver whose guest has an address now.
    let table = given.forwards.shared.lock();
    std::thread::scope(|scope| {
        let opening = scope.spawn(|| given.forwards.expose(vec![wanted.clone()]));
        let until = std::time::Instant::now() + PATIENCE;
        while !path.exists() {
            assert!(std::time::Instant::now() < until, "it waits for the table");
            std::thread::yield_now();
        }
        drop(table);
        assert_eq!(opening.join().unwrap().unwrap(), std::slice::from_ref(&wanted));
    });
}

#[test]
fn the_limit_of_forwards_holds() {
    let given = given(&[GUEST], 2);
    given.open(forward(Protocol::Tcp, any_port()));
    given.open(forward(Protocol::Udp, any_port()));
    assert_eq!(
        given.refusal(forward(Protocol::Tcp, any_port())),
        "2 forwards are open, and 2 may be; close some first"
    );
    assert_eq!(given.metrics.forwards_open.get(), 2);
    assert_eq!(given.router.vms(), [VmId(1)]);
}

#[test]
fn what_cannot_be_forwarded_is_refused() {
    let given = given(&[GUEST], 8);
    assert_eq!(
        given.refusal(forward(Protocol::Icmp, any_port())),
        "icmp cannot be forwarded (expected tcp or udp)"
    );
    assert_eq!(
        given.refusal(at(Protocol::Udp, "unix:///run/web.sock")),
        "udp cannot be forwarded from a Unix socket (expected tcp)"
    );
    assert_eq!(
        given.refusal(Forward {
            target: "192.168.127.2:0".parse().unwrap(),
            ..forward(Protocol::Tcp, any_port())
        }),
        "192.168.127.2:0 is not a place in the network (expected a unicast address and a port other than 0)"
    );
    assert_eq!(
        given.refusal(forward(Protocol::Tcp, "192.0.2.1:8080".parse().unwrap())),
        "192.0.2.1:8080 is not an address of this host"
    );
    assert!(given.forwards.list().is_empty());
}
