//! One VM's part in a Unix datagram socket that it shares with others: vfkit, krunkit, QEMU's `-netdev dgram`.
//!
//! What it sends comes by its [`Mailbox`] from the thread that reads the socket ([`super::shared`]); what goes
//! to it is sent from here, to its own address. There is no end of stream: asking for a connection to its
//! address, on a socket made for the purpose, tells whether anything is there still.
//!
//! A socket that is connected to one peer would make each call cheaper and tell when the peer has room
//! again, but the kernel then refuses every other VM, so it stays as it is. A VM that does not read its
//! datagrams is waited for briefly by the kernel ([`SEND_PATIENCE`]), in this VM's own thread.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mio::Waker;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::engine::frame::DropReason;
use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::link::mailbox::{Dropped, Mailbox, frame_at};
use crate::link::{Filled, LinkError, is_gone, would_block};

/// How long a full queue of the VM's is waited for before the rest of its thread's work is done.
pub(super) const SEND_PATIENCE: Duration = Duration::from_millis(2);
/// When it is tried again then.
const RETRY_MS: u64 = 1;

/// One VM on a shared socket.
pub struct DatagramLink {
    /// Shared. It blocks, as long as [`SEND_PATIENCE`].
    socket: Arc<Socket>,
    peer: Peer,
    /// Which file its path was when it came.
    file: Option<FileIdentity>,
    mailbox: Arc<Mailbox>,
    /// Taken from there.
    frames: Vec<u8>,
    at: usize,
    dropped: Dropped,
    retry: bool,
}

/// A file's device, its number there, and when it was made, since numbers are given again at once. Neither
/// use of a socket nor a change of its mode changes them.
type FileIdentity = (u64, u64, (i64, i64));

/// Where a VM is answered.
pub(super) struct Peer {
    address: SockAddr,
    path: Option<PathBuf>,
}

impl Peer {
    /// Of a Unix address as the system gave it, its family not included: a path, or a name of Linux's that
    /// begins with a zero byte.
    ///
    /// # Errors
    /// When it is too long to be one.
    pub(super) fn new(address: &[u8]) -> io::Result<Self> {
        let path = Path::new(std::ffi::OsStr::from_bytes(address));
        Ok(Self {
            address: SockAddr::unix(path)?,
            path: (address.first() != Some(&0)).then(|| path.to_owned()),
        })
    }

    /// Which file its path is now.
    fn file(&self) -> Option<FileIdentity> {
        let metadata = std::fs::symlink_metadata(self.path.as_ref()?).ok()?;
        let made = (metadata.mtime(), metadata.mtime_nsec());
        Some((metadata.dev(), metadata.ino(), made))
    }

    /// Whether a socket is there. One that is connected to ours refuses any other, which says as much.
    fn is_served(&self) -> bool {
        let asked = Socket::new(Domain::UNIX, Type::DGRAM, None).and_then(|s| s.connect(&self.address));
        !asked.is_err_and(|error| is_gone(&error))
    }
}

impl DatagramLink {
    pub(super) fn new(socket: Arc<Socket>, peer: Peer, mailbox: Arc<Mailbox>) -> Self {
        Self {
            socket,
            file: peer.file(),
            peer,
            mailbox,
            frames: Vec::new(),
            at: 0,
            dropped: Dropped::default(),
            retry: false,
        }
    }

    pub(super) fn wake_with(&mut self, waker: &Arc<Waker>) {
        self.mailbox.wake_with(Arc::clone(waker));
    }

    pub(super) fn has_news(&self) -> bool {
        self.mailbox.has_news()
    }

    pub(super) fn fill(&mut self) -> Filled {
        self.at = 0;
        self.dropped = self.mailbox.take(&mut self.frames);
        if self.frames.is_empty() && self.dropped == Dropped::default() {
            Filled::Nothing
        } else {
            Filled::Some
        }
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
                Err(error) if would_block(&error) || error.raw_os_error() == Some(libc::ENOBUFS) => {
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
        match self
            .socket
            .send_to_with_flags(frame, &self.peer.address, libc::MSG_DONTWAIT)
        {
            // Nothing tells when a peer that is not connected has room again, so this waits for it.
            Err(error) if would_block(&error) => self.socket.send_to(frame, &self.peer.address),
            sent => sent,
        }
    }

    pub(super) fn retry_after_ms(&self) -> Option<u64> {
        self.retry.then_some(RETRY_MS)
    }

    /// Whether it is the same hypervisor still: something listens at its address, and its file is the one it
    /// was. One that was started anew there is another guest, whom its next datagram brings.
    pub(super) fn is_alive(&self) -> bool {
        self.peer.file() == self.file && self.peer.is_served()
    }
}
