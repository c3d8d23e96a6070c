//! A guest whose hypervisor's socket is cut and dialled again while it is at work, as QEMU's `reconnect-ms` and
//! gvforwarder do: its connections live on, it is the same VM, and what was allowed to it still is.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vnet_tests::{Running, World, echo, eventually, staged};

const CONNECT: &[u8] = b"POST /connect HTTP/1.1\r\nHost: \r\n\r\n";

/// Sends bytes to an echo server bit by bit, over one connection, until it is told to end, and compares what comes
/// back. Prints how far it is.
const CARRY_ON: &str = r#"
import os, socket, sys, time
with socket.create_connection(('203.0.113.10', 9000), 30) as s:
    s.settimeout(60)
    sent = 0
    while not os.path.exists('enough'):
        piece = os.urandom(20000)
        s.sendall(piece)
        got = b''
        while len(got) < len(piece):
            more = s.recv(65536)
            if not more: sys.exit('it was closed')
            got += more
        if got != piece: sys.exit('garbled')
        sent += len(piece)
        with open('far', 'w') as f: f.write(str(sent))
        time.sleep(0.02)
print('whole')
"#;

/// How a relay's two sides put frames on their streams.
#[derive(Clone, Copy)]
enum Framing {
    Qemu,
    Connect,
}

impl Framing {
    /// The next whole frame, its length included.
    fn read(self, stream: &mut UnixStream) -> std::io::Result<Vec<u8>> {
        let mut frame = vec![0; if matches!(self, Self::Qemu) { 4 } else { 2 }];
        stream.read_exact(&mut frame)?;
        let length = match self {
            Self::Qemu => u32::from_be_bytes(frame[..].try_into().expect("four")) as usize,
            Self::Connect => u16::from_le_bytes(frame[..].try_into().expect("two")).into(),
        };
        let behind = frame.len();
        frame.resize(behind + length, 0);
        stream.read_exact(&mut frame[behind..])?;
        Ok(frame)
    }
}

/// A hypervisor that dials the network for its guest, and again after a cut.
struct Hypervisor {
    network: PathBuf,
    framing: Framing,
    up: Arc<Mutex<Option<UnixStream>>>,
    guest: UnixStream,
}

impl Hypervisor {
    /// Waits for its guest, and dials.
    fn start(network: &Path, own: UnixListener, framing: Framing) -> Self {
        let (guest, _) = own.accept().expect("its guest comes");
        let hypervisor = Self {
            network: network.to_owned(),
            framing,
            up: Arc::default(),
            guest,
        };
        hypervisor.dial();
        let (mut from, up) = (
            hypervisor.guest.try_clone().expect("a descriptor"),
            Arc::clone(&hypervisor.up),
        );
        std::thread::spawn(move || {
            while let Ok(frame) = framing.read(&mut from) {
                // Without a link, frames are lost.
                if let Some(up) = &mut *up.lock().expect("nobody panics") {
                    let _ = up.write_all(&frame);
                }
            }
        });
        hypervisor
    }

    fn dial(&self) {
        let mut up = UnixStream::connect(&self.network).expect("it listens");
        if matches!(self.framing, Framing::Connect) {
            up.write_all(CONNECT).expect("it reads");
        }
        let (mut down, mut guest) = (
            up.try_clone().expect("a descriptor"),
            self.guest.try_clone().expect("a descriptor"),
        );
        let framing = self.framing;
        std::thread::spawn(move || {
            while let Ok(frame) = framing.read(&mut down) {
                if guest.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        *self.up.lock().expect("nobody panics") = Some(up);
    }

    fn cut(&self) {
        if let Some(up) = self.up.lock().expect("nobody panics").take() {
            let _ = up.shutdown(Shutdown::Both);
        }
    }
}

/// The VMs that there are: their names, and whether they are there.
fn vms(world: &World) -> Vec<(String, bool)> {
    let vms = world.list(&["vm", "list"]);
    vms.iter()
        .map(|vm| {
            let text = |key: &str| vm[key].as_str().unwrap_or_default().to_owned();
            (text("name"), text("state").ends_with("_ATTACHED"))
        })
        .collect()
}

fn is_there(world: &World, there: bool) {
    let web = vec![("web".to_owned(), there)];
    eventually("the VM's state", || vms(world) == web);
}

fn far(world: &World) -> u64 {
    let far = std::fs::read_to_string(world.work().join("far")).unwrap_or_default();
    far.parse().unwrap_or_default()
}

fn story(flag: &'static str, scheme: &'static str, framing: Framing) -> impl FnOnce(&World) {
    move |world| {
        let _echo = echo(world.internet(), "203.0.113.10:9000");
        let socket = world.runtime_dir().join("network.sock");
        let url = format!("{scheme}://{}", socket.display());
        let mut up = Running::start(world.command(&["up", "--vm", "web", "--mode", "ask", flag, &url]));
        up.complains("serving VM web");
        let own = world.runtime_dir().join("hypervisor.sock");
        let listener = UnixListener::bind(&own).expect("a path of its own");
        let script = world.file("carry_on.py", CARRY_ON);
        let mut load = world.load();
        let word = match framing {
            Framing::Qemu => "qemu",
            Framing::Connect => "short",
        };
        load.args(["guest", "--framing", word, "--socket"]).arg(&own);
        load.args(["--", "python3"]).arg(&script).stdin(Stdio::null());
        let guest = Running::start(load);
        let hypervisor = Hypervisor::start(&socket, listener, framing);

        // Until the VM stops.
        world.vnetctl(&["approve", &world.first_pending_id()]);
        eventually("it is at work", || far(world) > 100_000);
        is_there(world, true);
        let grants = || world.list(&["grants", "list"]);
        let before = grants();
        assert_eq!(before.len(), 1, "{before:?}");
        assert!(before[0].to_string().contains("untilVmStops"), "{before:?}");

        for away in [0, 300, 2_000] {
            hypervisor.cut();
            let before = far(world);
            if away > 0 {
                is_there(world, false);
                std::thread::sleep(Duration::from_millis(away));
            }
            let began = Instant::now();
            hypervisor.dial();
            eventually("it goes on", || far(world) > before + 100_000);
            is_there(world, true);
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{away}: {:?}",
                began.elapsed()
            );
        }
        assert_eq!(grants().len(), 1);
        assert!(world.pending().is_empty(), "nobody is asked again");
        world.file("enough", "");
        let ended = guest.wait();
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "whole\n"), "{ended:?}");

        // One that stays away ends, and its grant with it.
        hypervisor.cut();
        is_there(world, false);
        eventually("it is over", || vms(world).is_empty());
        assert!(grants().is_empty());

        let began = Instant::now();
        up.signal(Signal::SIGTERM);
        let ended = up.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }
}

#[test]
fn a_guest_lives_through_a_cut_of_qemus_socket() {
    staged(
        a_guest_lives_through_a_cut_of_qemus_socket,
        story("--listen-qemu", "unix", Framing::Qemu),
    );
}

#[test]
fn a_guest_lives_through_a_cut_of_its_connect() {
    staged(
        a_guest_lives_through_a_cut_of_its_connect,
        story("--listen", "unix", Framing::Connect),
    );
}

#[test]
fn while_its_guest_is_away_it_ends_at_once() {
    staged(while_its_guest_is_away_it_ends_at_once, |world| {
        let (up, socket) = world.up(&[]);
        // It asks for the gateway's hardware address: one that has sent nothing of sense is not kept.
        let own = [2, 0, 0, 0, 0, 2];
        let mut frame = vec![0, 0, 0, 42];
        frame.extend([0xff; 6]);
        frame.extend(own);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(own);
        frame.extend([192, 168, 127, 2, 0, 0, 0, 0, 0, 0, 192, 168, 127, 1]);
        let mut hypervisor = UnixStream::connect(&socket).expect("it listens");
        hypervisor.write_all(&frame).expect("it reads");
        is_there(world, true);
        drop(hypervisor);
        is_there(world, false);
        let began = Instant::now();
        up.signal(Signal::SIGTERM);
        let ended = up.wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        assert!(!Path::new(&socket).exists());
    });
}

/// Only receives, and prints how far it is.
const RECEIVE: &str = r#"
import os, socket
with socket.create_connection(('203.0.113.10', 9001), 30) as s:
    got = 0
    while not os.path.exists('enough'):
        more = s.recv(65536)
        if not more: raise SystemExit('it was closed')
        got += len(more)
        with open('far', 'w') as f: f.write(str(got))
print('whole')
"#;

#[test]
fn a_guest_that_only_receives_lives_through_a_cut_too() {
    staged(a_guest_that_only_receives_lives_through_a_cut_too, |world| {
        let _source = vnet_tests::tcp(world.internet(), "203.0.113.10:9001", |mut stream, _| {
            while stream.write_all(&[7; 20_000]).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let (_up, socket) = world.up(&[]);
        let own = world.runtime_dir().join("hypervisor.sock");
        let listener = UnixListener::bind(&own).expect("a path of its own");
        let script = world.file("receive.py", RECEIVE);
        let mut load = world.load();
        load.args(["guest", "--framing", "qemu", "--socket"]).arg(&own);
        load.args(["--", "python3"]).arg(&script).stdin(Stdio::null());
        let guest = Running::start(load);
        let hypervisor = Hypervisor::start(Path::new(&socket), listener, Framing::Qemu);
        eventually("it is at work", || far(world) > 100_000);
        for _ in 0..2 {
            hypervisor.cut();
            is_there(world, false);
            std::thread::sleep(Duration::from_secs(2));
            let before = far(world);
            hypervisor.dial();
            eventually("it goes on", || far(world) > before + 100_000);
            is_there(world, true);
        }
        world.file("enough", "");
        let ended = guest.wait();
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "whole\n"), "{ended:?}");
    });
}
