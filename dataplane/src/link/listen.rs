//! Opens the sockets that guests connect to: private to their owner, a stale one replaced, removed at the end.
//!
//! What is done with those who come is [`serve`](super::serve)'s, and [`shared`](super::shared)'s for datagrams.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::ListenAt;
use crate::link::stream::StreamSocket;

/// Guests' connections that wait to be accepted: few, as a guest that comes back waits behind all of them.
const BACKLOG: i32 = 128;
/// Clients' connections that wait to be accepted, as many as Go's listeners let wait on Linux; the host may have a lower
/// limit (listen(2), `somaxconn`). One more of a client that does not wait is refused (`EAGAIN`).
pub(crate) const CLIENTS_BACKLOG: i32 = 4096;
/// Who may connect: the owner.
const MODE: u32 = 0o600;

/// What helps where a socket cannot be opened, to stand between that and the error.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => ", as something listens there; stop it, or listen elsewhere",
        io::ErrorKind::AddrNotAvailable => ", as this host has no such address; listen at another",
        io::ErrorKind::NotFound => ", as its directory is not there; make it, or listen elsewhere",
        io::ErrorKind::NotADirectory => ", as a file stands where its directory should; listen elsewhere",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; listen where this user may",
        _ => "",
    }
}

/// A socket in the file system. Dropping this removes it, if what is at its path still is that socket, or the one
/// that was put in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    keeper: Keeper,
}

/// Knows which socket is at a path, and sees to it that one which is removed stays so.
#[derive(Debug, Clone)]
pub(super) struct Keeper(Arc<Mutex<Option<(u64, u64)>>>);

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            keeper: Keeper(Arc::new(Mutex::new(Some(identity(path)?)))),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For whoever puts another socket in this one's place.
    pub(super) fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }
}

impl Keeper {
    /// Puts another socket at the path, which is not removed meanwhile.
    ///
    /// # Errors
    /// That of `replace`, and when it is removed already.
    pub(super) fn unless_removed<T>(
        &self,
        path: &Path,
        replace: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let mut there = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if there.is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let replaced = replace()?;
        *there = Some(identity(path)?);
        Ok(replaced)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let there = self
            .keeper
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        // Somebody may have put something else there meanwhile.
        if there.is_some() && identity(&self.path).ok() == there {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

/// A listening stream socket: Unix, TCP or vsock.
#[derive(Debug)]
pub struct StreamListener(Socket);

impl StreamListener {
    /// Opens one, and its file where it has one.
    ///
    /// # Errors
    /// The system's, as an address in use; and for an inherited descriptor, which does not listen.
    pub fn open(at: &ListenAt) -> io::Result<(Self, Option<SocketFile>)> {
        match at {
            ListenAt::Unix(path) => Self::at_path(path).map(|(listener, file)| (listener, Some(file))),
            ListenAt::Tcp(address) => Ok((Self(std::net::TcpListener::bind(address)?.into()), None)),
            ListenAt::Vsock { cid, port } => Ok((Self(vsock(*cid, *port)?), None)),
            ListenAt::Fd(_) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "an inherited descriptor is one guest's and listens for no others",
            )),
        }
    }

    /// Opens one at a path, and its file.
    ///
    /// # Errors
    /// The system's, as an address in use.
    pub fn at_path(path: &Path) -> io::Result<(Self, SocketFile)> {
        let (socket, file) = bind_private(path, Type::STREAM)?;
        socket.listen(BACKLOG)?;
        Ok((Self(socket), file))
    }

    /// Lets as many clients wait as a server's do, where no guest has to come back past them.
    ///
    /// # Errors
    /// The system's.
    pub fn of_clients(self) -> io::Result<Self> {
        self.0.listen(CLIENTS_BACKLOG)?;
        Ok(self)
    }

    /// Waits for the next who connects.
    ///
    /// # Errors
    /// The system's, as too many descriptors.
    pub fn accept(&self) -> io::Result<StreamSocket> {
        self.accept_from().map(|(socket, _)| socket)
    }

    /// The same, and which VM it is, where the system tells.
    ///
    /// # Errors
    /// As [`Self::accept`].
    pub fn accept_from(&self) -> io::Result<(StreamSocket, Option<Cid>)> {
        let (socket, address) = self.0.accept()?;
        Ok((socket.into(), cid_of(&address)))
    }

    /// Where it really listens, port 0 replaced, if over TCP.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.0.local_addr().ok()?.as_socket()
    }
}

/// A VM by its number in vsock, which its hypervisor gives it (vsock(7)): no guest can speak as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cid(pub u32);

/// Of the host's own programs, below the first VM's number, none: one may speak for several VMs.
#[cfg(target_os = "linux")]
fn cid_of(address: &SockAddr) -> Option<Cid> {
    let (cid, _port) = address.as_vsock_address()?;
    (cid > libc::VMADDR_CID_HOST && cid != libc::VMADDR_CID_ANY).then_some(Cid(cid))
}

#[cfg(not(target_os = "linux"))]
fn cid_of(_address: &SockAddr) -> Option<Cid> {
    None
}

impl From<StreamListener> for OwnedFd {
    fn from(listener: StreamListener) -> Self {
        listener.0.into()
    }
}

/// A listening socket of records (`SOCK_SEQPACKET`), as BESS and User Mode Linux connect to.
#[derive(Debug)]
pub struct RecordListener(Socket);

impl RecordListener {
    /// Opens one, and its file.
    ///
    /// # Errors
    /// The system's; outside of Linux, Unix sockets have no records.
    pub fn open(path: &Path) -> io::Result<(Self, SocketFile)> {
        #[cfg(target_os = "linux")]
        {
            let (socket, file) = bind_private(path, Type::SEQPACKET)?;
            socket.listen(BACKLOG)?;
            Ok((Self(socket), file))
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = path;
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Waits for the next who connects.
    ///
    /// # Errors
    /// The system's, as too many descriptors.
    pub fn accept(&self) -> io::Result<Socket> {
        self.0.accept().map(|(socket, _)| socket)
    }
}

#[cfg(target_os = "linux")]
fn vsock(cid: Option<u32>, port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(cid.unwrap_or(libc::VMADDR_CID_ANY), port))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

#[cfg(not(target_os = "linux"))]
fn vsock(_cid: Option<u32>, _port: u32) -> io::Result<Socket> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Binds a Unix socket that only its owner may connect to. A socket file that nothing serves any more is
/// replaced; one that answers is not.
pub(crate) fn bind_private(path: &Path, kind: Type) -> io::Result<(Socket, SocketFile)> {
    let bind = || {
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        // On Linux the file is made with the socket's mode, so that it is never open to others.
        // SAFETY: changes the mode of an open descriptor, and nothing else.
        unsafe { libc::fchmod(socket.as_raw_fd(), MODE as libc::mode_t) };
        // The one thing that an address has against a path.
        let address = SockAddr::unix(path).map_err(|_| io::Error::from_raw_os_error(libc::ENAMETOOLONG))?;
        socket.bind(&address)?;
        Ok(socket)
    };
    let socket = match bind() {
        Err(error) if io::Error::kind(&error) == io::ErrorKind::AddrInUse && is_stale(path) => {
            std::fs::remove_file(path)?;
            bind()?
        }
        Err(error) if io::Error::kind(&error) == io::ErrorKind::AddrInUse => {
            let Some(found) = found_at(path) else {
                return Err(error);
            };
            let text = format!("it is there already and {found}; move it away, or listen elsewhere");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        bound => bound?,
    };
    let file = SocketFile::new(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE))?;
    Ok((socket, file))
}

/// What is at a path that no socket can be put in the place of; `None` for a socket.
pub(crate) fn found_at(path: &Path) -> Option<&'static str> {
    let kind = std::fs::symlink_metadata(path).ok()?.file_type();
    match () {
        () if kind.is_socket() => None,
        () if kind.is_dir() => Some("is a directory"),
        () if kind.is_symlink() => Some("is a symbolic link"),
        () if kind.is_file() => Some("is a file"),
        () => Some("is no socket"),
    }
}

/// Whether a path is a socket that nobody serves, as a process leaves it that was killed.
pub fn is_stale(path: &Path) -> bool {
    if !std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        return false;
    }
    let connects = |kind| {
        let socket = Socket::new(Domain::UNIX, kind, None)?;
        // One whose queue is full is served, and is not waited for.
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    match (connects(Type::STREAM), connects(Type::DGRAM)) {
        (Ok(()), _) | (_, Ok(())) => false,
        // One of them is the wrong type of socket (EPROTOTYPE); the right one says whether it is served.
        (Err(stream), Err(datagram)) => refused(stream) || refused(datagram),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vnet-listen{}-{name}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn sockets_are_their_owners_and_leave_no_file() {
        let directory = Directory::new("owner");
        let path = directory.0.join("s");
        for kind in [Type::STREAM, Type::DGRAM] {
            let (socket, file) = bind_private(&path, kind).unwrap();
            assert_eq!(mode(&path), 0o600);
            drop((socket, file));
            assert!(!path.exists());
        }
        #[cfg(target_os = "linux")]
        {
            let (listener, file) = RecordListener::open(&path).unwrap();
            assert_eq!(mode(&path), 0o600);
            drop((listener, file));
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else() {
        let directory = Directory::new("stale");
        let path = directory.0.join("s");
        let at = ListenAt::Unix(path.clone());
        drop(UnixListener::bind(&path).unwrap());
        let (listener, _file) = StreamListener::open(&at).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        (&listener.accept().unwrap()).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        assert_eq!(
            StreamListener::open(&at).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        assert!(
            bind_private(&path, Type::DGRAM).is_err(),
            "served, of another type"
        );

        let datagrams = directory.0.join("d");
        drop(UnixDatagram::bind(&datagrams).unwrap());
        let _served = bind_private(&datagrams, Type::DGRAM).unwrap();
        assert!(bind_private(&datagrams, Type::DGRAM).is_err(), "served");

        let file = directory.0.join("f");
        std::fs::write(&file, "a person's").unwrap();
        let refused = StreamListener::open(&ListenAt::Unix(file.clone())).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert!(
            refused.to_string().contains("is a file; move it away"),
            "{refused}"
        );
        assert_eq!(std::fs::read(&file).unwrap(), b"a person's");
    }

    #[test]
    fn over_tcp_it_says_where_it_really_listens() {
        let at = ListenAt::Tcp("127.0.0.1:0".parse().unwrap());
        let (listener, file) = StreamListener::open(&at).unwrap();
        assert!(file.is_none());
        let address = listener.tcp_address().unwrap();
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"x").unwrap();
        assert_eq!((&listener.accept().unwrap()).read(&mut [0; 2]).unwrap(), 1);
        assert!(StreamListener::open(&ListenAt::Fd(9)).is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn many_clients_may_connect_before_the_first_is_accepted() {
        let at_most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let many = at_most.trim().parse::<usize>().unwrap().min(500);
        let directory = Directory::new("many");
        let path = directory.0.join("s");
        let (listener, _file) = StreamListener::at_path(&path).unwrap();
        let _listener = listener.of_clients().unwrap();
        let address = SockAddr::unix(&path).unwrap();

        let clients: Vec<_> = (0..many)
            .map(|_| {
                let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
                client.set_nonblocking(true).unwrap();
                client.connect(&address).unwrap();
                client
            })
            .collect();

        assert_eq!(clients.len(), many);
    }

    /// Connections need a transport of vsock, as between VMs; without one, this much can be seen.
    #[cfg(target_os = "linux")]
    #[test]
    fn over_vsock_it_listens_for_whoever_can_reach_it() {
        const PORT: u32 = 0x7f31_0000;
        let port = PORT + std::process::id();
        let (listener, file) = match StreamListener::open(&ListenAt::Vsock { cid: None, port }) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return,
            opened => opened.unwrap(),
        };
        assert!(file.is_none() && listener.tcp_address().is_none());
        let vm = |cid| cid_of(&SockAddr::vsock(cid, port));
        assert_eq!((vm(3), vm(u32::MAX - 1)), (Some(Cid(3)), Some(Cid(u32::MAX - 1))));
        for host in [0, libc::VMADDR_CID_LOCAL, libc::VMADDR_CID_HOST, u32::MAX] {
            assert_eq!(vm(host), None);
        }
        let local = listener.0.local_addr().unwrap().as_vsock_address().unwrap();
        assert_eq!(local, (libc::VMADDR_CID_ANY, port));
        let taken = StreamListener::open(&ListenAt::Vsock { cid: None, port }).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        // Where the machine can reach itself, all the way.
        let client = Socket::new(Domain::VSOCK, Type::STREAM, None).unwrap();
        if client
            .connect(&SockAddr::vsock(libc::VMADDR_CID_LOCAL, port))
            .is_ok()
        {
            (&StreamSocket::from(client)).write_all(b"x").unwrap();
            assert_eq!((&listener.accept().unwrap()).read(&mut [0; 2]).unwrap(), 1);
        }
    }
}
