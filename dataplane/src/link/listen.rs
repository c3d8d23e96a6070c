//! Listens for hypervisors: each that comes becomes a guest of the network.
//!
//! The first guest on a socket goes by the socket's name, further ones by NAME-2, NAME-3; a name is
//! free again when its guest is gone.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::link::datagram::DatagramLink;
use crate::link::stream::StreamLink;
use crate::link::{FRAME_BYTES_MAX, Link};
use crate::network::{GuestSpec, Network};

/// How long a listener rests after an error of the system, as too many descriptors.
const REST: Duration = Duration::from_millis(100);
/// Guests on one socket at once.
pub const GUESTS_MAX: usize = 256;

/// A guest socket in the file system, removed when this is dropped.
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Names of the guests of one socket.
struct Names {
    spec: GuestSpec,
    taken: Mutex<BTreeSet<usize>>,
}

impl Names {
    fn take(self: &Arc<Self>) -> Option<(GuestSpec, Taken)> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let number = (1..=GUESTS_MAX).find(|n| !taken.contains(n))?;
        taken.insert(number);
        let mut spec = self.spec.clone();
        if number > 1 {
            spec.name = format!("{}-{number}", spec.name);
            // What pins one guest cannot pin another.
            (spec.pinned_mac, spec.pinned_address) = (None, None);
        }
        Some((
            spec,
            Taken {
                names: Arc::clone(self),
                number,
            },
        ))
    }
}

struct Taken {
    names: Arc<Names>,
    number: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.names
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.number);
    }
}

/// Listens for QEMU's `-netdev stream` on a Unix socket.
///
/// # Errors
/// The system's, as an address in use.
pub fn stream_unix(network: &Arc<Network>, path: &Path, spec: GuestSpec) -> io::Result<SocketFile> {
    let listener = bind_private(path, |path| UnixListener::bind(path))?;
    let file = SocketFile(path.to_owned());
    accept_loop(network, spec, move || {
        let (stream, _) = listener.accept()?;
        Ok(Link::Stream(StreamLink::unix(stream)?))
    })?;
    Ok(file)
}

/// Listens for QEMU's `-netdev stream` on a TCP socket; the caller has made sure that it is loopback.
/// Where it really listens.
///
/// # Errors
/// The system's, as an address in use.
pub fn stream_tcp(network: &Arc<Network>, address: SocketAddr, spec: GuestSpec) -> io::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    accept_loop(network, spec, move || {
        let (stream, _) = listener.accept()?;
        Ok(Link::Stream(StreamLink::tcp(stream)?))
    })?;
    Ok(address)
}

fn accept_loop(
    network: &Arc<Network>,
    spec: GuestSpec,
    accept: impl Fn() -> io::Result<Link> + Send + 'static,
) -> io::Result<()> {
    let network = Arc::clone(network);
    let names = Arc::new(Names {
        spec,
        taken: Mutex::default(),
    });
    thread::Builder::new().name("accept".to_owned()).spawn(move || {
        loop {
            let link = match accept() {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a hypervisor");
                    thread::sleep(REST);
                    continue;
                }
            };
            let Some((spec, taken)) = names.take() else {
                tracing::warn!(
                    limit = GUESTS_MAX,
                    "too many guests on one socket; one was turned away"
                );
                continue;
            };
            if let Err(error) = network.attach_then(link, spec, move || drop(taken)) {
                tracing::error!(%error, "cannot start a guest");
            }
        }
    })?;
    Ok(())
}

/// Listens for vfkit, krunkit or QEMU's `-netdev dgram` on a Unix datagram socket: one guest at a
/// time; when it is gone, the next sender is adopted.
///
/// # Errors
/// The system's, as an address in use.
pub fn datagram(network: &Arc<Network>, path: &Path, spec: GuestSpec) -> io::Result<SocketFile> {
    let socket = bind_private(path, |path| UnixDatagram::bind(path))?;
    let file = SocketFile(path.to_owned());
    let network = Arc::clone(network);
    thread::Builder::new().name("adopt".to_owned()).spawn(move || {
        let mut first = vec![0; FRAME_BYTES_MAX];
        loop {
            if let Err(error) = adopt(&network, &socket, &spec, &mut first) {
                tracing::warn!(%error, "cannot serve a hypervisor's datagrams");
                thread::sleep(REST);
            }
        }
    })?;
    Ok(file)
}

/// Serves one guest from its first datagram to its end.
fn adopt(
    network: &Arc<Network>,
    socket: &UnixDatagram,
    spec: &GuestSpec,
    first: &mut [u8],
) -> io::Result<()> {
    wait_readable(socket)?;
    let (length, sender) = match socket.recv_from(first) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        received => received?,
    };
    let Some(peer) = sender.as_pathname() else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the hypervisor's socket has no path to answer to; it must be bound to one",
        ));
    };
    let link = Link::Datagram(DatagramLink::adopt(socket.try_clone()?, peer, &first[..length])?);
    let guest = network.attach(link, spec.clone())?;
    // The guest's thread reports its own end.
    let _ = guest.join();
    disconnect(socket)
}

fn wait_readable(socket: &UnixDatagram) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut descriptors = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut descriptors, PollTimeout::NONE)?;
    Ok(())
}

/// Undoes `connect`, so that any sender is heard again.
fn disconnect(socket: &UnixDatagram) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    if !cfg!(target_os = "linux") {
        return Ok(());
    }
    // SAFETY: an address of family AF_UNSPEC has no further content (connect(2)); all zero bytes are a
    // valid `sockaddr`, and it outlives the call.
    let result = unsafe {
        let mut address: libc::sockaddr = std::mem::zeroed();
        address.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
        let length = std::mem::size_of::<libc::sockaddr>() as libc::socklen_t;
        libc::connect(socket.as_raw_fd(), &raw const address, length)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Binds a socket that only its owner may connect to. A socket file that nothing serves any more is
/// replaced; one that answers is not.
pub(crate) fn bind_private<S>(path: &Path, bind: impl Fn(&Path) -> io::Result<S>) -> io::Result<S> {
    let socket = match bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
            std::fs::remove_file(path)?;
            bind(path)?
        }
        bound => bound?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(socket)
}

/// Whether a path is a socket that nobody serves.
fn is_stale(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    if !std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        return false;
    }
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    let stream = std::os::unix::net::UnixStream::connect(path);
    let datagram = UnixDatagram::unbound().and_then(|socket| socket.connect(path));
    match (stream, datagram) {
        (Ok(_), _) | (_, Ok(())) => false,
        // One of them is the wrong type of socket (EPROTOTYPE); the right one says whether it is served.
        (Err(stream), Err(datagram)) => refused(stream) || refused(datagram),
    }
}
