//! Listeners: sockets bound once, stale ones replaced, and only checked peers let in.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Stream;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::transport::server::Connected;

use crate::config::Endpoint;
use crate::metrics::Metrics;
use crate::paths::{self, PathError};
use crate::peer::{self, Peer};
use crate::turned_away::TurnedAway;

/// Why nothing can listen somewhere.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The directory or the path will not do.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Another controlplane answers there.
    #[error("a controlplane already serves {}; stop it, or listen elsewhere", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{} exists and is not a socket; remove it, or listen elsewhere", .0.display())]
    NotSocket(PathBuf),
    /// The system refuses.
    #[error("cannot listen on {endpoint}")]
    Io {
        /// Where.
        endpoint: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The descriptor is not a Unix stream socket.
    #[error("descriptor {0} is not an inherited unix stream socket")]
    Descriptor(RawFd),
}

/// Counts what is attached, so that an idle controlplane can end.
#[derive(Debug, Clone)]
pub struct Attached(Arc<watch::Sender<usize>>);

impl Attached {
    /// Nothing is attached.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Follows the count.
    pub fn subscribe(&self) -> watch::Receiver<usize> {
        self.0.subscribe()
    }

    fn attach(&self) -> Token {
        self.0.send_modify(|count| *count += 1);
        Token(self.clone())
    }
}

impl Default for Attached {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug)]
struct Token(Attached);

impl Drop for Token {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// A lock beside a socket: two controlplanes never share one, and never remove each other's.
#[derive(Debug)]
pub struct SocketLock {
    path: PathBuf,
    _file: Flock<fs::File>,
}

impl SocketLock {
    /// Takes the lock of a socket's path, or `None` if another process has it.
    ///
    /// # Errors
    /// [`ListenError`] if the directory will not do.
    pub fn try_take(socket: &Path) -> Result<Option<Self>, ListenError> {
        if let Some(dir) = socket.parent()
            && (!dir.exists() || dir == paths::runtime_dir())
        {
            paths::ensure_private_dir(dir)?;
        }
        let mut name = socket.file_name().unwrap_or_default().to_owned();
        name.push(".lock");
        let path = socket.with_file_name(name);
        let failed = |source| ListenError::Io {
            endpoint: path.display().to_string(),
            source,
        };
        loop {
            let file = fs::OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(failed)?;
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Ok(None),
                Err((_, e)) => return Err(failed(e.into())),
            };
            // Its last holder may have removed the name between our open and our lock.
            let held = file.metadata().map_err(failed)?;
            if fs::metadata(&path).is_ok_and(|m| m.ino() == held.ino() && m.dev() == held.dev()) {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for SocketLock {
    fn drop(&mut self) {
        // While it is still held: whoever opened the name before sees that it is gone, and tries again.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether something answers on a socket.
pub fn answers(socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(socket).is_ok()
}

/// One bound listener. Dropping it removes its socket.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    attached: Attached,
    metrics: Arc<Metrics>,
    turned_away: TurnedAway,
}

#[derive(Debug)]
enum Kind {
    Accepting {
        listener: UnixListener,
        path: Option<PathBuf>,
    },
    Connected(Option<UnixStream>),
}

impl Listener {
    /// Binds an endpoint. For a path, its [`SocketLock`] must be held.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(
        endpoint: &Endpoint,
        attached: &Attached,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Io {
            endpoint: endpoint.to_string(),
            source,
        };
        let kind = match endpoint {
            Endpoint::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
                Kind::Accepting {
                    listener,
                    path: Some(path.clone()),
                }
            }
            Endpoint::Fd(number) => inherited(*number)
                .map_err(failed)?
                .ok_or(ListenError::Descriptor(*number))?,
        };
        Ok(Self {
            kind,
            attached: attached.clone(),
            metrics: Arc::clone(metrics),
            turned_away: TurnedAway::new(Arc::clone(metrics)),
        })
    }

    fn wrap(&self, stream: UnixStream, peer: Peer) -> Conn {
        Conn {
            stream,
            peer,
            _token: self.attached.attach(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Accepting { path: Some(path), .. } = &self.kind {
            let _ = fs::remove_file(path);
        }
    }
}

impl Stream for Listener {
    type Item = io::Result<Conn>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            let stream = match &mut this.kind {
                Kind::Accepting { listener, .. } => match std::task::ready!(listener.poll_accept(cx)) {
                    Ok((stream, _)) => stream,
                    Err(e) => return Poll::Ready(Some(Err(e))),
                },
                // Whoever started this process gave it the pair: that is its identity.
                Kind::Connected(pair) => match pair.take() {
                    Some(stream) => {
                        let peer = Peer {
                            user: "inherited".to_owned(),
                            process: String::new(),
                        };
                        return Poll::Ready(Some(Ok(this.wrap(stream, peer))));
                    }
                    None => return Poll::Pending,
                },
            };
            match peer::check(&stream) {
                Ok(peer) => return Poll::Ready(Some(Ok(this.wrap(stream, peer)))),
                Err(e) => {
                    this.metrics.peers_refused.add(1);
                    let cause = std::error::Error::source(&e)
                        .map(ToString::to_string)
                        .unwrap_or_default();
                    tracing::warn!(error = %e, cause, "connection refused");
                    if let Some(why) = e.told() {
                        this.turned_away.answer(stream, why);
                    }
                }
            }
        }
    }
}

/// A connection from a checked peer.
#[derive(Debug)]
pub struct Conn {
    stream: UnixStream,
    peer: Peer,
    _token: Token,
}

impl Connected for Conn {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io {
        endpoint: format!("unix://{}", path.display()),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed(e)),
        Ok(found) if !found.file_type().is_socket() => Err(ListenError::NotSocket(path.to_owned())),
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => Err(ListenError::InUse(path.to_owned())),
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
            Err(e) => Err(failed(e)),
        },
    }
}

fn inherited(number: RawFd) -> io::Result<Option<Kind>> {
    // SAFETY: only reads the descriptor's flags; an open descriptor is required of whoever passes fd://.
    if unsafe { nix::libc::fcntl(number, nix::libc::F_SETFD, nix::libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open (checked above), and fd:// hands it over to this process alone.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let stream = getsockopt(&fd, sockopt::SockType) == Ok(nix::sys::socket::SockType::Stream);
    let unix = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(number).is_ok();
    if !stream || !unix {
        return Ok(None);
    }
    if getsockopt(&fd, sockopt::AcceptConn) == Ok(true) {
        let listener = std::os::unix::net::UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        Ok(Some(Kind::Accepting {
            listener: UnixListener::from_std(listener)?,
            path: None,
        }))
    } else {
        let pair = std::os::unix::net::UnixStream::from(fd);
        pair.set_nonblocking(true)?;
        Ok(Some(Kind::Connected(Some(UnixStream::from_std(pair)?))))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd as _;

    use futures_util::StreamExt as _;

    use super::*;
    use crate::testing::TempDir;

    fn bind(endpoint: &Endpoint) -> Result<Listener, ListenError> {
        Listener::bind(endpoint, &Attached::new(), &Arc::new(Metrics::default()))
    }

    #[tokio::test]
    async fn stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = TempDir::new();
        let path = dir.path().join("s.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let endpoint = Endpoint::Unix(path.clone());
        let first = bind(&endpoint).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&endpoint), Err(ListenError::InUse(_))));
        drop(first);
        assert!(!path.exists(), "a listener removes its socket");
        fs::write(&path, "").unwrap();
        assert!(matches!(bind(&endpoint), Err(ListenError::NotSocket(_))));
    }

    #[tokio::test]
    async fn connections_are_counted_while_they_last() {
        let dir = TempDir::new();
        let path = dir.path().join("s.sock");
        let attached = Attached::new();
        let mut listener = Listener::bind(
            &Endpoint::Unix(path.clone()),
            &attached,
            &Arc::new(Metrics::default()),
        )
        .unwrap();
        let _client = UnixStream::connect(&path).await.unwrap();
        let conn = listener.next().await.unwrap().unwrap();
        assert_eq!(*attached.subscribe().borrow(), 1);
        drop(conn);
        assert_eq!(*attached.subscribe().borrow(), 0);
    }

    #[tokio::test]
    async fn an_inherited_pair_is_one_connection() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut listener = bind(&Endpoint::Fd(theirs.into_raw_fd())).unwrap();
        let conn = listener.next().await.unwrap().unwrap();
        assert_eq!(conn.connect_info().user, "inherited");
        drop(ours);
        let (udp, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(matches!(
            bind(&Endpoint::Fd(udp.into_raw_fd())),
            Err(ListenError::Descriptor(_))
        ));
    }

    #[test]
    fn a_sockets_lock_has_one_holder_and_leaves_nothing() {
        let dir = TempDir::new();
        let path = dir.path().join("s.sock");
        let first = SocketLock::try_take(&path).unwrap().unwrap();
        assert!(SocketLock::try_take(&path).unwrap().is_none());
        drop(first);
        assert!(SocketLock::try_take(&path).unwrap().is_some());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
