//! One VM's part in a Unix datagram socket that it shares with others: vfkit, krunkit, QEMU's `-netdev dgram`.
//!
//! What it sends comes by its `Mailbox` from the thread that reads the socket ([`super::shared`]); what goes
//! to it is sent from here, to its own address. There is no end of stream: asking for a connection to its
//! address, on a socket made for the purpose, tells whether anything is there still.
//!
//! What is sent and not yet read counts against the socket that it was sent from. So no VM may share that with
//! another, which would wait for it:
//!
//! - Where the VM takes datagrams from anybody (QEMU), it is sent them from a socket of its own, which is
//!   connected to it and tells when it has room again.
//! - Where it is connected to the socket that it sent to (vfkit, krunkit), it takes none from elsewhere. That
//!   socket is left to it then: the next VM finds another at the path. It is not connected in turn, as the
//!   kernel would refuse whoever else came to it meanwhile; so nothing tells when there is room, and a VM that
//!   does not read is waited for briefly (`SEND_PATIENCE`), in its own thread.
//!
//! Outside of Linux, what was sent counts against the receiver, and all are answered from the shared socket.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mio::event::Source as _;
use mio::net::UnixDatagram;
use mio::{Interest, Registry, Token, Waker};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::engine::frame::DropReason;
use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::link::mailbox::{Dropped, Mailbox, frame_at};
use crate::link::stream::widen;
use crate::link::{Filled, LinkError, is_gone, would_block};

/// How long a full queue of the VM's is waited for before the rest of its thread's work is done.
pub(super) const SEND_PATIENCE: Duration = Duration::from_millis(2);
/// When it is tried again then.
const RETRY_MS: u64 = 1;

/// One VM on a shared socket.
pub struct DatagramLink {
    way: Way,
    peer: Arc<Peer>,
    mailbox: Arc<Mailbox>,
    /// Taken from there.
    frames: Vec<u8>,
    at: usize,
    dropped: Dropped,
    retry: bool,
}

/// By which socket a VM is answered.
pub(super) enum Way {
    /// One of its own, connected to it; it does not block.
    Own(UnixDatagram),
    /// The one that it sends to. It blocks, as long as [`SEND_PATIENCE`].
    Shared(Arc<Socket>),
}

/// A file's device, its number there, and when it was made, since numbers are given again at once. Neither
/// use of a socket nor a change of its mode changes them.
type FileIdentity = (u64, u64, (i64, i64));

/// Where a VM is answered.
pub(super) struct Peer {
    address: SockAddr,
    path: Option<PathBuf>,
    /// Which file its path was when it came.
    file: Option<FileIdentity>,
}

impl Peer {
    /// Of a Unix address as the system gave it, its family not included: a path, or a name of Linux's that
    /// begins with a zero byte.
    ///
    /// # Errors
    /// When it is too long to be one.
    pub(super) fn new(address: &[u8]) -> io::Result<Self> {
        let path = Path::new(std::ffi::OsStr::from_bytes(address));
        let is_path = address.first() != Some(&0);
        Ok(Self {
            address: SockAddr::unix(path)?,
            path: is_path.then(|| path.to_owned()),
            file: is_path.then(|| file_at(path)).flatten(),
        })
    }

    /// Whether it is the same hypervisor still: something listens at its address, and its file is the one it
    /// was. One that was started anew there is another guest, whom its next datagram brings.
    pub(super) fn is_alive(&self) -> bool {
        self.path.as_deref().and_then(file_at) == self.file && self.is_served()
    }

    /// Whether a socket is there. One that is connected to ours refuses any other, which says as much.
    fn is_served(&self) -> bool {
        !self.connect().is_err_and(|error| is_gone(&error))
    }

    fn connect(&self) -> io::Result<Socket> {
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        socket.connect(&self.address)?;
        Ok(socket)
    }

    /// How it is to be answered, who sends to this socket.
    ///
    /// # Errors
    /// The system's, as when it is gone already.
    pub(super) fn way(&self, shared: &Arc<Socket>) -> io::Result<Way> {
        if !cfg!(target_os = "linux") {
            return Ok(Way::Shared(Arc::clone(shared)));
        }
        match self.connect() {
            Ok(own) => {
                own.set_nonblocking(true)?;
                widen(&own);
                Ok(Way::Own(UnixDatagram::from_std(own.into())))
            }
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(Way::Shared(Arc::clone(shared))),
            Err(error) => Err(error),
        }
    }
}

/// Which file is at a path now.
fn file_at(path: &Path) -> Option<FileIdentity> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let made = (metadata.mtime(), metadata.mtime_nsec());
    Some((metadata.dev(), metadata.ino(), made))
}

impl DatagramLink {
    pub(super) fn new(way: Way, peer: Arc<Peer>, mailbox: Arc<Mailbox>) -> Self {
        Self {
            way,
            peer,
            mailbox,
            frames: Vec::new(),
            at: 0,
            dropped: Dropped::default(),
            retry: false,
        }
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        waker: &Arc<Waker>,
    ) -> io::Result<()> {
        self.mailbox.wake_with(Arc::clone(waker));
        match &mut self.way {
            Way::Own(socket) => socket.register(registry, token, Interest::WRITABLE),
            Way::Shared(_) => Ok(()),
        }
    }

    pub(super) fn has_news(&self) -> bool {
        self.mailbox.has_news()
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        if self.mailbox.is_closed() {
            return Err(LinkError::Closed);
        }
        self.at = 0;
        self.dropped = self.mailbox.take(&mut self.frames);
        let is_empty = self.frames.is_empty() && self.dropped == Dropped::default();
        Ok(if is_empty { Filled::Nothing } else { Filled::Some })
    }

    pub(super) fn next_frame(&mut self) -> Option<&[u8]> {
        let (frame, next) = frame_at(&self.frames, self.at)?;
        self.at = next;
        Some(frame)
    }

    pub(super) fn take_drops(&mut self) -> [(DropReason, u64); 2] {
        std::mem::take(&mut self.dropped).by_reason()
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        self.retry = false;
        while let Some(frame) = queue.first_frame() {
            let length = frame.len();
            match self.send(frame) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if would_block(&error) => {
                    self.retry = matches!(self.way, Way::Shared(_));
                    return Ok(false);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.retry = true;
                    return Ok(false);
                }
                Err(error) if is_gone(&error) => return Err(LinkError::Closed),
                // Longer than it takes at once, or connected to another for now: the frame is lost.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EMSGSIZE | libc::EPERM)) => {}
                Err(error) => return Err(LinkError::Io(error)),
            }
            queue.consume(PREFIX_BYTES + length);
        }
        Ok(true)
    }

    fn send(&self, frame: &[u8]) -> io::Result<usize> {
        let socket = match &self.way {
            Way::Own(socket) => return socket.send(frame),
            Way::Shared(socket) => socket,
        };
        match socket.send_to_with_flags(frame, &self.peer.address, libc::MSG_DONTWAIT) {
            // Nothing tells when it has room again, so this waits for it.
            Err(error) if would_block(&error) => socket.send_to(frame, &self.peer.address),
            sent => sent,
        }
    }

    pub(super) fn retry_after_ms(&self) -> Option<u64> {
        self.retry.then_some(RETRY_MS)
    }

    /// As of [`Peer::is_alive`].
    pub(super) fn is_alive(&self) -> bool {
        self.peer.is_alive()
    }
}
