//! A connected stream of the host, whatever its kind: what a forward or a tunnel hands to a guest.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream as StdTcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use socket2::{Domain, SockRef, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connected stream, not yet in anybody's poller.
#[derive(Debug)]
pub enum HostStream {
    /// TCP.
    Tcp(StdTcpStream),
    /// A Unix socket, or any other kind whose bytes are read, written and ended by the same calls (vsock).
    Unix(StdUnixStream),
}

/// What cannot be piped into a guest.
#[derive(Debug, thiserror::Error)]
pub enum NotAStream {
    /// No socket, or one that the system says nothing of.
    #[error("it is no socket")]
    Socket(#[source] io::Error),
    /// Datagrams, or a listener of them.
    #[error("it is a socket of another type than a stream")]
    Type,
    /// It listens.
    #[error("it listens for connections and is none")]
    Listens,
}

impl HostStream {
    /// Takes a descriptor from another process for what it is.
    ///
    /// # Errors
    /// [`NotAStream`]; the descriptor is closed then.
    pub fn from_descriptor(descriptor: OwnedFd) -> Result<Self, NotAStream> {
        let socket = SockRef::from(&descriptor);
        if socket.r#type().map_err(NotAStream::Socket)? != Type::STREAM {
            return Err(NotAStream::Type);
        }
        // Where the system does not say, reading will.
        if socket.is_listener().unwrap_or(false) {
            return Err(NotAStream::Listens);
        }
        socket.local_addr().map_err(NotAStream::Socket)?;
        Ok(Self::accepted(descriptor))
    }

    /// Of a stream that was accepted, whatever its kind.
    pub fn accepted(descriptor: OwnedFd) -> Self {
        let address = SockRef::from(&descriptor).local_addr();
        match address.map(|address| address.domain()) {
            Ok(Domain::IPV4 | Domain::IPV6) => Self::Tcp(descriptor.into()),
            _ => Self::Unix(descriptor.into()),
        }
    }

    /// Makes the close that follows a reset, where the kind of socket has one. If it cannot be, the other side
    /// sees an ordinary end.
    pub fn set_reset(&self) {
        if let Self::Tcp(stream) = self {
            // SO_LINGER of zero: the peer sees RST.
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// Makes reads and writes return at once.
    ///
    /// # Errors
    /// The system's.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(true),
            Self::Unix(stream) => stream.set_nonblocking(true),
        }
    }
}

impl From<StdTcpStream> for HostStream {
    fn from(stream: StdTcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<StdUnixStream> for HostStream {
    fn from(stream: StdUnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl From<HostStream> for OwnedFd {
    fn from(stream: HostStream) -> Self {
        match stream {
            HostStream::Tcp(stream) => stream.into(),
            HostStream::Unix(stream) => stream.into(),
        }
    }
}

/// The same within a tokio runtime.
#[derive(Debug)]
pub enum AsyncStream {
    /// TCP.
    Tcp(tokio::net::TcpStream),
    /// As [`HostStream::Unix`].
    Unix(tokio::net::UnixStream),
}

impl AsyncStream {
    /// Follows a stream in the runtime that this is called in.
    ///
    /// # Errors
    /// The system's.
    pub fn new(stream: HostStream) -> io::Result<Self> {
        stream.set_nonblocking()?;
        Ok(match stream {
            HostStream::Tcp(stream) => Self::Tcp(tokio::net::TcpStream::from_std(stream)?),
            HostStream::Unix(stream) => Self::Unix(tokio::net::UnixStream::from_std(stream)?),
        })
    }

    /// Takes it out of the runtime. It stays non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn into_host(self) -> io::Result<HostStream> {
        Ok(match self {
            Self::Tcp(stream) => HostStream::Tcp(stream.into_std()?),
            Self::Unix(stream) => HostStream::Unix(stream.into_std()?),
        })
    }
}

/// Runs the same on either kind.
macro_rules! on_either {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream.get_mut() {
            AsyncStream::Tcp(stream) => {
                let $inner = Pin::new(stream);
                $call
            }
            AsyncStream::Unix(stream) => {
                let $inner = Pin::new(stream);
                $call
            }
        }
    };
}

impl AsyncRead for AsyncStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        on_either!(self, inner => inner.poll_read(context, buffer))
    }
}

impl AsyncWrite for AsyncStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        on_either!(self, inner => inner.poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_either!(self, inner => inner.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_either!(self, inner => inner.poll_shutdown(context))
    }
}

/// The same in a driver's poller. It is non-blocking.
#[derive(Debug)]
pub(super) enum PolledStream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl PolledStream {
    /// # Errors
    /// When it cannot be made non-blocking.
    pub(super) fn new(stream: HostStream) -> io::Result<Self> {
        stream.set_nonblocking()?;
        Ok(match stream {
            HostStream::Tcp(stream) => Self::Tcp(TcpStream::from_std(stream)),
            HostStream::Unix(stream) => Self::Unix(UnixStream::from_std(stream)),
        })
    }

    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self {
            Self::Tcp(stream) => registry.register(stream, token, interest),
            Self::Unix(stream) => registry.register(stream, token, interest),
        }
    }

    pub(super) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&*stream).read(bytes),
            Self::Unix(stream) => (&*stream).read(bytes),
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&*stream).write(bytes),
            Self::Unix(stream) => (&*stream).write(bytes),
        }
    }

    /// Nothing more will be written. One that the other side has closed meanwhile is no failure.
    pub(super) fn finish_writing(&self) -> io::Result<()> {
        let finished = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
        };
        match finished {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(()),
        }
    }

    /// What a dial has come to: `None` while it is under way.
    pub(super) fn poll_dial(&self) -> Option<io::Result<()>> {
        let Self::Tcp(stream) = self else {
            return Some(Ok(()));
        };
        match stream.take_error() {
            Ok(Some(error)) | Err(error) => return Some(Err(error)),
            Ok(None) => {}
        }
        match stream.peer_addr() {
            Ok(_) => Some(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
            Err(error) => Some(Err(error)),
        }
    }

    pub(super) fn set_nodelay(&self) {
        if let Self::Tcp(stream) = self {
            let _ = stream.set_nodelay(true);
        }
    }

    /// As [`HostStream::set_reset`].
    pub(super) fn set_reset(&self) {
        if let Self::Tcp(stream) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn descriptors_are_taken_for_what_they_are() {
        let (unix, _other) = StdUnixStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            HostStream::from_descriptor(unix.into()),
            Ok(HostStream::Unix(_))
        ));
        assert!(matches!(
            HostStream::from_descriptor(tcp.into()),
            Ok(HostStream::Tcp(_))
        ));
        assert!(matches!(
            HostStream::from_descriptor(datagrams.into()),
            Err(NotAStream::Type)
        ));
        assert!(matches!(
            HostStream::from_descriptor(file.into()),
            Err(NotAStream::Socket(_))
        ));
        assert!(matches!(
            HostStream::from_descriptor(listener.into()),
            Err(NotAStream::Listens)
        ));
        let path = std::env::temp_dir().join(format!("vnet-stream{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(
            HostStream::from_descriptor(listener.into()),
            Err(NotAStream::Listens)
        ));
        let _ = std::fs::remove_file(&path);
    }
}
