//! Guests that come by every kind of link to a real network: what they are answered, what of theirs is dropped
//! and counted, and that none keeps another from its answers.

mod forward;
mod grace;
mod kept;

use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::mpsc;

use super::listen::{SocketFile, StreamListener};
use super::packet::{PacketKind, PacketLink};
use super::serve::{Entrance, GUESTS_MAX};
use super::stream::{StreamKind, StreamLink};
use super::vpnkit::{Answers, HANDSHAKES_MAX};
use super::{FRAME_BYTES_MAX, Link, serve, shared};
use crate::config::{ListenAt, MTU_BYTES_MAX};
use crate::mac::Mac;
use crate::message::Report;
use crate::network::tests::{counter, network_of};
use crate::network::{GuestSpec, Network};

const GATEWAY: [u8; 4] = [192, 168, 127, 1];
const PATIENCE: Duration = Duration::from_secs(20);

/// A network, and a directory for its sockets.
struct Rig {
    network: Arc<Network>,
    reports: mpsc::Receiver<Report>,
    directory: PathBuf,
    _runtime: tokio::runtime::Runtime,
}

impl Rig {
    fn new(name: &str) -> Self {
        Self::with_mtu(name, 1500)
    }

    fn with_mtu(name: &str, mtu_bytes: u16) -> Self {
        Self::with(name, mtu_bytes, Duration::ZERO)
    }

    /// Guests without a link are kept so long, where they can come back.
    fn with(name: &str, mtu_bytes: u16, grace: Duration) -> Self {
        let directory = std::env::temp_dir().join(format!("vnet-link{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (reports, receiver) = mpsc::channel(4_096);
        let network = {
            let _context = runtime.enter();
            network_of(reports, mtu_bytes, grace)
        };
        Self {
            network,
            reports: receiver,
            directory,
            _runtime: runtime,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn shared_socket(&self) -> SocketFile {
        shared::datagrams(&self.network, &self.path("ours"), spec()).unwrap()
    }

    fn streams(&self, name: &str) -> SocketFile {
        let (listener, file) = StreamListener::open(&ListenAt::Unix(self.path(name))).unwrap();
        serve::streams(&self.network, listener, spec()).unwrap();
        file.unwrap()
    }

    /// A VM on the shared socket, at an address of its own.
    fn vm(&self, name: &str) -> Datagrams {
        let socket = UnixDatagram::bind(self.path(name)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Datagrams {
            socket,
            to: self.path("ours"),
        }
    }

    /// The next report of which `pick` makes something.
    fn report<T>(&mut self, mut pick: impl FnMut(Report) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.reports.try_recv() {
                Ok(report) => {
                    if let Some(picked) = pick(report) {
                        return picked;
                    }
                }
                Err(_) => {
                    assert!(Instant::now() < until, "no such report");
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn next_up(&mut self) -> (String, &'static str) {
        self.report(|report| match report {
            Report::VmUp(up) => Some((up.name, up.transport)),
            _ => None,
        })
    }

    fn next_down(&mut self) {
        self.report(|report| matches!(report, Report::VmDown { .. }).then_some(()));
    }

    /// Waits until so many frames of one guest were dropped for this.
    fn dropped(&mut self, reason: &str, count: u64) {
        self.report(|report| match report {
            Report::VmStatus(status) => {
                (status.dropped_frames.get(reason).copied().unwrap_or(0) >= count).then_some(())
            }
            _ => None,
        });
    }

    fn counts(&self, name: &str, count: u64) {
        let until = Instant::now() + PATIENCE;
        while counter(&self.network, name) < count {
            assert!(Instant::now() < until, "{name}: {}", counter(&self.network, name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.network.stop();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn spec() -> GuestSpec {
    GuestSpec {
        name: "web".to_owned(),
        ..GuestSpec::default()
    }
}

/// Who asks for the gateway's address.
#[derive(Clone, Copy)]
struct Asker {
    mac: Mac,
    address: Ipv4Addr,
}

fn asker(number: u8) -> Asker {
    Asker {
        mac: Mac([2, 0, 0, 0, 0, number]),
        address: Ipv4Addr::new(192, 168, 127, number),
    }
}

impl Asker {
    fn question(self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(Mac::BROADCAST.0);
        frame.extend(self.mac.0);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(self.mac.0);
        frame.extend(self.address.octets());
        frame.extend([0; 6]);
        frame.extend(GATEWAY);
        frame
    }

    /// An echo request to the gateway, with so many bytes.
    fn ping(self, bytes: usize) -> Vec<u8> {
        let total = u16::try_from(20 + 8 + bytes).unwrap().to_be_bytes();
        let mut frame = Vec::new();
        frame.extend([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]);
        frame.extend(self.mac.0);
        // Its checksums are wrong, which nobody minds.
        frame.extend([8, 0, 0x45, 0, total[0], total[1], 0, 1, 0, 0, 64, 1, 0, 0]);
        frame.extend(self.address.octets());
        frame.extend(GATEWAY);
        frame.extend([8, 0, 0, 0, 0, 7, 0, 1]);
        frame.resize(frame.len() + bytes, 0x5a);
        frame
    }

    /// Asks and waits for the answer, which is to this asker.
    fn is_answered(self, wire: &mut dyn Wire) {
        wire.send(&self.question());
        loop {
            let frame = wire.receive();
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                assert_eq!(frame[..6], self.mac.0, "another's answer");
                assert_eq!(frame[28..32], GATEWAY);
                return;
            }
        }
    }
}

/// A hypervisor's end of a link.
trait Wire {
    fn send(&mut self, frame: &[u8]);
    fn receive(&mut self) -> Vec<u8>;
}

struct Datagrams {
    socket: UnixDatagram,
    to: PathBuf,
}

impl Wire for Datagrams {
    fn send(&mut self, frame: &[u8]) {
        self.socket.send_to(frame, &self.to).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = self.socket.recv(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

struct Stream {
    socket: UnixStream,
    kind: StreamKind,
}

impl Stream {
    fn new(socket: UnixStream, kind: StreamKind) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, kind }
    }

    fn frame(&self, frame: &[u8]) -> Vec<u8> {
        match self.kind {
            StreamKind::Qemu => [&u32::try_from(frame.len()).unwrap().to_be_bytes(), frame].concat(),
            _ => [&u16::try_from(frame.len()).unwrap().to_le_bytes(), frame].concat(),
        }
    }
}

impl Wire for Stream {
    fn send(&mut self, frame: &[u8]) {
        let bytes = self.frame(frame);
        self.socket.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        let length = match self.kind {
            StreamKind::Qemu => {
                let mut length = [0; 4];
                self.socket.read_exact(&mut length).unwrap();
                u32::from_be_bytes(length) as usize
            }
            _ => {
                let mut length = [0; 2];
                self.socket.read_exact(&mut length).unwrap();
                u16::from_le_bytes(length) as usize
            }
        };
        let mut frame = vec![0; length];
        self.socket.read_exact(&mut frame).unwrap();
        frame
    }
}

struct Packets(Socket);

impl Packets {
    fn pair(kind: Type) -> (Self, Socket) {
        let (here, there) = Socket::pair(Domain::UNIX, kind, None).unwrap();
        there.set_read_timeout(Some(PATIENCE)).unwrap();
        (Self(there), here)
    }
}

impl Wire for Packets {
    fn send(&mut self, frame: &[u8]) {
        self.0.send(frame).unwrap();
    }

    fn receive(&mut self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = (&self.0).read(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

/// Whether the other end is closed: one that is silent until the time to read is over is not.
fn is_closed(stream: &mut impl std::io::Read) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(read) => read == 0,
        Err(error) => !matches!(
            error.kind(),
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
        ),
    }
}

/// Attaches a guest over each kind of link that is one guest's from the start, and gives its other end.
fn attached(rig: &Rig) -> Vec<Box<dyn Wire>> {
    let mut wires: Vec<Box<dyn Wire>> = Vec::new();
    for kind in [
        StreamKind::Qemu,
        StreamKind::Connect,
        StreamKind::Vpnkit,
        StreamKind::Stdio,
    ] {
        let (here, there) = UnixStream::pair().unwrap();
        let link = Link::Stream(StreamLink::new(here, kind, &[]).unwrap());
        wires.push(Box::new(Stream::new(there, kind)));
        rig.network.attach(link, spec()).unwrap();
    }
    for (kind, socket) in [
        (PacketKind::Records, Type::SEQPACKET),
        (PacketKind::Datagrams, Type::DGRAM),
    ] {
        let (there, here) = Packets::pair(socket);
        let link = Link::Packet(PacketLink::new(here.into(), kind).unwrap());
        wires.push(Box::new(there));
        rig.network.attach(link, spec()).unwrap();
    }
    wires
}

#[test]
fn runts_are_counted_and_harm_nothing_on_any_link() {
    let mut rig = Rig::new("runts");
    let _file = rig.shared_socket();
    let vm = rig.vm("vm");
    // The first frame of a VM on a shared socket may be one too.
    let mut wires = attached(&rig);
    wires.push(Box::new(vm));
    for mut wire in wires {
        for length in 0..14 {
            wire.send(&vec![0xee; length]);
        }
        // One guest at a time has the address.
        asker(2).is_answered(&mut *wire);
        for length in (0..14).rev() {
            wire.send(&vec![0; length]);
        }
        asker(2).is_answered(&mut *wire);
        rig.dropped("malformed", 28);
        drop(wire);
        // Of datagrams without an end, too.
        rig.next_down();
    }
}

#[test]
fn an_absurd_length_ends_its_own_link_alone() {
    let mut rig = Rig::new("absurd");
    let _file = rig.streams("s");
    let connect = || Stream::new(UnixStream::connect(rig.path("s")).unwrap(), StreamKind::Qemu);
    let (mut good, mut bad, mut long) = (connect(), connect(), connect());
    asker(2).is_answered(&mut good);
    bad.socket.write_all(&[0xff; 4]).unwrap();
    let length = u32::try_from(FRAME_BYTES_MAX + 1).unwrap();
    long.socket.write_all(&length.to_be_bytes()).unwrap();
    rig.next_down();
    rig.next_down();
    for ended in [&mut bad, &mut long] {
        assert!(is_closed(&mut ended.socket));
    }
    asker(2).is_answered(&mut good);
    // Just as long as may be announced is a frame still.
    let length = u32::try_from(FRAME_BYTES_MAX).unwrap();
    good.socket.write_all(&length.to_be_bytes()).unwrap();
    good.socket.write_all(&vec![0; FRAME_BYTES_MAX]).unwrap();
    asker(2).is_answered(&mut good);
}

#[test]
fn a_capture_that_is_over_is_kept_by_nobody() {
    use crate::capture::{CaptureEnd, CaptureSpec};
    use crate::session::Captures as _;
    let mut rig = Rig::new("capture");
    let _file = rig.shared_socket();
    let mut vm = rig.vm("vm");
    asker(2).is_answered(&mut vm);
    let handle = rig.report(|report| match report {
        Report::VmUp(up) => Some(up.vm),
        _ => None,
    });
    let spec = CaptureSpec {
        ends_with_guest: true,
        ..CaptureSpec::default()
    };
    let capture = rig.network.start_capture(handle, spec, Box::new(|| {})).unwrap();
    let kept = Arc::downgrade(&capture);
    capture.stop(CaptureEnd::Stopped);
    drop(capture);
    // Its driver lets go of it with what it is shown next.
    let until = Instant::now() + PATIENCE;
    while kept.strong_count() > 0 {
        assert!(Instant::now() < until, "it is still there");
        asker(2).is_answered(&mut vm);
    }
}

#[test]
fn a_record_longer_than_any_frame_is_dropped_and_counted() {
    let mut rig = Rig::new("long");
    let (mut there, here) = Packets::pair(Type::SEQPACKET);
    let link = PacketLink::new(here.into(), PacketKind::Records).unwrap();
    rig.network.attach(Link::Packet(link), spec()).unwrap();
    there.send(&vec![0; FRAME_BYTES_MAX + 1]);
    asker(2).is_answered(&mut there);
    rig.dropped("oversize", 1);
}

#[test]
fn vms_on_one_datagram_socket_are_told_apart_and_each_is_answered_at_its_own_address() {
    let mut rig = Rig::new("two");
    let _file = rig.shared_socket();
    let (mut first, mut second) = (rig.vm("first"), rig.vm("second"));
    first.send(b"VFKT");
    asker(2).is_answered(&mut first);
    asker(3).is_answered(&mut second);
    asker(2).is_answered(&mut first);
    assert_eq!(rig.next_up(), ("web".to_owned(), "vfkit"));
    assert_eq!(rig.next_up(), ("web-2".to_owned(), "vfkit"));
}

#[test]
fn behind_the_stop_nobody_is_let_in() {
    let mut rig = Rig::new("late");
    let (_file, _streams) = (rig.shared_socket(), rig.streams("s"));
    let mut vm = rig.vm("vm");
    asker(2).is_answered(&mut vm);
    assert_eq!(rig.next_up().0, "web");
    rig.network.stop();
    rig.next_down();
    // It has noticed nothing, and sends on; others come.
    let late = rig.vm("late");
    for _ in 0..100 {
        let _ = vm.socket.send_to(&asker(2).question(), &vm.to);
        let _ = late.socket.send_to(&asker(3).question(), &late.to);
    }
    let mut stream = UnixStream::connect(rig.path("s")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(is_closed(&mut stream));
    while let Ok(report) = rig.reports.try_recv() {
        assert!(!matches!(report, Report::VmUp(_)), "{report:?}");
    }
    let refused = &rig.network.metrics().link_refusals;
    assert_eq!(refused.of(crate::metrics::LinkRefusal::System).get(), 0);
}

#[test]
fn a_vm_that_is_connected_to_us_is_alive_and_one_that_vanished_is_noticed_and_its_path_used_again() {
    let mut rig = Rig::new("again");
    let _file = rig.shared_socket();
    let (mut stays, mut goes) = (rig.vm("stays"), rig.vm("goes"));
    stays.socket.connect(rig.path("ours")).unwrap();
    let send_connected = |frame: &[u8]| stays.socket.send(frame).unwrap();
    send_connected(&asker(2).question());
    stays.receive();
    asker(3).is_answered(&mut goes);
    let _ = (rig.next_up(), rig.next_up());

    let began = Instant::now();
    drop(goes);
    rig.next_down();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // A new one at the same path, with another address: it is the same name's, and the first is there still.
    std::fs::remove_file(rig.path("goes")).unwrap();
    let mut comes = rig.vm("goes");
    asker(4).is_answered(&mut comes);
    assert_eq!(rig.next_up(), ("web-2".to_owned(), "vfkit"));

    // Nor does it have to be silent for a while in between.
    drop(comes);
    std::fs::remove_file(rig.path("goes")).unwrap();
    let mut comes = rig.vm("goes");
    let until = Instant::now() + PATIENCE;
    comes
        .socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    loop {
        comes.send(&asker(5).question());
        if comes.socket.recv(&mut [0; 64]).is_ok() {
            break;
        }
        assert!(Instant::now() < until, "the new one is held to be the old");
    }
    assert_eq!(stays.socket.send(&asker(2).question()).unwrap(), 42);
    stays.receive();
}

/// Asks until it is answered.
fn until_answered(vm: &Datagrams, number: u8) {
    let until = Instant::now() + PATIENCE;
    vm.socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    loop {
        vm.socket.send(&asker(number).question()).unwrap();
        if vm.socket.recv(&mut [0; 64]).is_ok() {
            return;
        }
        assert!(Instant::now() < until, "it is not answered");
    }
}

#[test]
fn a_vm_that_was_started_anew_at_another_path_has_the_name_that_it_had() {
    let mut rig = Rig::new("moved");
    let _file = rig.shared_socket();
    let stays = rig.vm("stays");
    stays.socket.connect(rig.path("ours")).unwrap();
    until_answered(&stays, 2);
    assert_eq!(rig.next_up().0, "web");
    for path in ["one", "two", "three"] {
        // The one before is closed when this one comes, and nobody has looked since.
        let vm = rig.vm(path);
        vm.socket.connect(rig.path("ours")).unwrap();
        until_answered(&vm, 3);
        assert_eq!(rig.next_up().0, "web-2", "{path}");
    }
    until_answered(&stays, 2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_vm_that_was_started_anew_at_the_same_abstract_name_is_answered_however_much_it_says() {
    use std::os::linux::net::SocketAddrExt as _;

    let mut rig = Rig::new("abstract");
    let _file = rig.shared_socket();
    let name = format!("vnet-link-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
    for number in [2, 2, 3] {
        let vm = Datagrams {
            socket: UnixDatagram::bind_addr(&address).unwrap(),
            to: rig.path("ours"),
        };
        vm.socket.connect(rig.path("ours")).unwrap();
        until_answered(&vm, number);
        assert_eq!(rig.next_up().0, "web");
    }
}

#[test]
fn vms_that_are_connected_to_the_socket_keep_it_and_others_find_the_next() {
    let mut rig = Rig::new("keep");
    let file = rig.shared_socket();
    let mut vms: Vec<_> = ["a", "b", "c"].map(|name| rig.vm(name)).into();
    for vm in &vms {
        vm.socket.connect(rig.path("ours")).unwrap();
    }
    // The last of them comes when the path is another socket's; two came before.
    let late = rig.vm("late");
    let ask = |vm: &Datagrams, number| {
        vm.socket.send(&asker(number).question()).unwrap();
        assert_eq!(vm.socket.recv(&mut [0; 64]).unwrap(), 42);
    };
    for round in 0..3 {
        for (number, vm) in (2..).zip(&vms) {
            ask(vm, number);
        }
        if round == 0 {
            late.socket.connect(rig.path("ours")).unwrap();
            use std::os::unix::fs::PermissionsExt as _;
            let metadata = std::fs::metadata(rig.path("ours")).unwrap();
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        }
        ask(&late, 5);
    }
    for _ in 0..4 {
        rig.next_up();
    }
    // Those that are gone are noticed on every socket.
    drop(late);
    vms.pop();
    rig.next_down();
    rig.next_down();
    ask(&vms[0], 2);
    drop(file);
    let left: Vec<_> = std::fs::read_dir(&rig.directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        !left.iter().any(|name| name == "ours" || name.starts_with('.')),
        "{left:?}"
    );
}

#[test]
fn whoever_sends_from_no_address_is_counted_and_delays_nobody() {
    let rig = Rig::new("unnamed");
    let _file = rig.shared_socket();
    let nameless = UnixDatagram::unbound().unwrap();
    for _ in 0..100 {
        nameless.send_to(&asker(3).question(), rig.path("ours")).unwrap();
    }
    let mut vm = rig.vm("vm");
    asker(2).is_answered(&mut vm);
    rig.counts("network_link_unnamed", 100);
}

#[test]
fn a_socket_has_so_many_guests_and_no_more() {
    let rig = Rig::new("many");
    let entrance = Entrance::new(&rig.network, spec());
    let mut all: Vec<_> = (0..GUESTS_MAX).map(|_| entrance.admit().unwrap()).collect();
    assert!(entrance.admit().is_none());
    assert_eq!(counter(&rig.network, "network_link_limit"), 1);
    assert_eq!(all[255].spec.name, "web-256");
    drop(all.swap_remove(0));
    assert_eq!(entrance.admit().unwrap().spec.name, "web", "free again");
}

/// How long the slowest of so many questions is waited for.
fn slowest(wire: &mut dyn Wire, asker: Asker) -> Duration {
    let times = (0..50).map(|_| {
        let began = Instant::now();
        asker.is_answered(wire);
        began.elapsed()
    });
    times.max().unwrap_or_default()
}

#[test]
fn a_vm_that_never_reads_delays_no_other_on_its_socket() {
    let rig = Rig::new("slow");
    let _file = rig.shared_socket();
    let (mut reads, deaf) = (rig.vm("reads"), rig.vm("deaf"));
    asker(2).is_answered(&mut reads);
    deaf.socket.set_nonblocking(true).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let sent = Arc::new(AtomicU64::new(0));
    let (stopped, counted, to) = (Arc::clone(&stop), Arc::clone(&sent), rig.path("ours"));
    let flood = std::thread::spawn(move || {
        let question = asker(3).question();
        while !stopped.load(Ordering::Relaxed) {
            if deaf.socket.send_to(&question, &to).is_ok() {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    // There is something to be delayed by.
    let until = Instant::now() + PATIENCE;
    while sent.load(Ordering::Relaxed) < 1_000 {
        assert!(Instant::now() < until, "{}", sent.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(5));
    }
    let slowest = slowest(&mut reads, asker(2));
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[test]
fn what_deaf_vms_were_sent_takes_no_room_from_another() {
    let rig = Rig::with_mtu("room", MTU_BYTES_MAX);
    let _file = rig.shared_socket();
    // Half of them connected as vfkit is, half of them not, as QEMU is.
    let mut deaf = Vec::new();
    for number in 3..7 {
        let mut vm = rig.vm(&format!("deaf{number}"));
        if number < 5 {
            vm.socket.connect(rig.path("ours")).unwrap();
            vm.socket.send(&asker(number).question()).unwrap();
            vm.receive();
        } else {
            asker(number).is_answered(&mut vm);
        }
        let ping = asker(number).ping(60_000);
        for round in 0..200 {
            let sent = if number < 5 {
                vm.socket.send(&ping)
            } else {
                vm.socket.send_to(&ping, &vm.to)
            };
            assert_eq!(sent.unwrap(), ping.len(), "{round}");
        }
        deaf.push(vm);
    }
    let mut reads = rig.vm("reads");
    assert!(slowest(&mut reads, asker(2)) < Duration::from_secs(1));
    reads.send(&asker(2).ping(60_000));
    assert_eq!(reads.receive().len(), 14 + 20 + 8 + 60_000);
}

#[test]
fn a_stream_that_is_never_read_delays_no_other() {
    let rig = Rig::new("deaf");
    let _file = rig.streams("s");
    let connect = || Stream::new(UnixStream::connect(rig.path("s")).unwrap(), StreamKind::Qemu);
    let (mut reads, mut deaf) = (connect(), connect());
    asker(2).is_answered(&mut reads);
    // Until not even questions are taken any more.
    deaf.socket
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let questions = deaf.frame(&asker(3).question()).repeat(1_000);
    while deaf.socket.write_all(&questions).is_ok() {}
    assert!(slowest(&mut reads, asker(2)) < Duration::from_secs(1));
}

#[cfg(target_os = "linux")]
#[test]
fn records_are_served_one_guest_a_connection() {
    let mut rig = Rig::new("records");
    let (listener, _file) = super::listen::RecordListener::open(&rig.path("s")).unwrap();
    serve::records(&rig.network, listener, spec()).unwrap();
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.connect(&SockAddr::unix(rig.path("s")).unwrap()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Packets(socket)
    };
    let (mut first, mut second) = (connect(), connect());
    asker(2).is_answered(&mut first);
    asker(3).is_answered(&mut second);
    // An empty record is a runt, and no end.
    first.send(&[]);
    asker(2).is_answered(&mut first);
    drop(first);
    rig.next_down();
    asker(3).is_answered(&mut second);
}

/// What HyperKit says before its frames.
fn handshake(uuid: &str) -> Vec<u8> {
    let mut said = b"VMN3T\x01\0\0\0".to_vec();
    said.resize(49, b'0');
    said.push(1);
    said.extend(uuid.as_bytes());
    said.extend([0; 4]);
    said
}

#[test]
fn vpnkit_guests_come_and_go_and_a_bad_handshake_delays_nobody() {
    let mut rig = Rig::new("vpnkit");
    let (listener, _file) = StreamListener::open(&ListenAt::Unix(rig.path("s"))).unwrap();
    let uuid = "c3d68012-0208-11ea-9fd7-f2189899ab08";
    let answers = Answers {
        macs: [(uuid.to_owned(), Mac([2, 0, 0, 0, 0, 2]))].into(),
        mtu_bytes: 1500,
        ..Answers::default()
    };
    serve::vpnkit(&rig.network, listener, spec(), answers).unwrap();
    let path = rig.path("s");
    let connect = || UnixStream::connect(&path).unwrap();
    // Two that are half-way for as long as they may, one that speaks something else, one that breaks off.
    let mut silent = connect();
    silent.write_all(b"VMN3").unwrap();
    let _half = connect().write_all(&handshake(uuid)[..60]);
    let mut other = connect();
    other.write_all(b"GET /services HTTP/1.1\r\n\r\n").unwrap();
    assert!(is_closed(&mut other));
    rig.counts("network_link_handshake", 2);

    for round in 0..3 {
        let mut client = connect();
        let question = asker(2).question();
        let length = u16::try_from(question.len()).unwrap().to_le_bytes();
        // The first frame may come with the handshake.
        client
            .write_all(&[&handshake(uuid)[..], &length, &question].concat())
            .unwrap();
        let mut answer = [0; 49 + 258];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[49..60], [1, 0xdc, 5, 0xea, 5, 2, 0, 0, 0, 0, 2]);
        let mut client = Stream::new(client, StreamKind::Vpnkit);
        assert_eq!(client.receive()[..6], [2, 0, 0, 0, 0, 2], "round {round}");
        asker(2).is_answered(&mut client);
        assert_eq!(rig.next_up().1, "vpnkit");
        drop(client);
        rig.next_down();
    }
    assert_eq!(silent.write(b"T").unwrap(), 1, "it has its time still");
}

#[test]
fn at_the_limit_of_handshakes_the_one_that_stalls_longest_makes_way() {
    let mut rig = Rig::new("vpnkit");
    let (listener, _file) = StreamListener::open(&ListenAt::Unix(rig.path("s"))).unwrap();
    let answers = Answers {
        mtu_bytes: 1500,
        ..Answers::default()
    };
    serve::vpnkit(&rig.network, listener, spec(), answers).unwrap();
    let path = rig.path("s");
    let connect = || UnixStream::connect(&path).unwrap();
    let mut stalled: Vec<UnixStream> = (0..HANDSHAKES_MAX)
        .map(|_| {
            let mut client = connect();
            client.write_all(&handshake("")[..49]).unwrap();
            // It is under way once it is answered.
            client.read_exact(&mut [0; 49]).unwrap();
            client
        })
        .collect();
    let uuid = "c3d68012-0208-11ea-9fd7-f2189899ab08";
    let mut client = connect();
    client.write_all(&handshake(uuid)).unwrap();
    let mut answer = [0; 49 + 258];
    client.read_exact(&mut answer).unwrap();
    let mut client = Stream::new(client, StreamKind::Vpnkit);
    asker(2).is_answered(&mut client);
    assert_eq!(rig.next_up().1, "vpnkit");

    assert!(is_closed(&mut stalled[0]));
    rig.counts("network_link_limit", 1);
    // All others have their time still: whoever says the rest is let in.
    let rest = &handshake(uuid)[49..];
    stalled[1].write_all(rest).unwrap();
    stalled[1].read_exact(&mut [0; 258]).unwrap();
    rig.counts("network_link_limit", 1);
    assert_eq!(counter(&rig.network, "network_link_handshake"), 0);
}
