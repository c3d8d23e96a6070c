//! Descriptors that carry one frame a read and one a write: a TAP device or packet socket (`run`'s namespaces),
//! a socket of records (BESS, User Mode Linux), an inherited datagram socket (vfkit and its kin).

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Duration;

use mio::event::Source as _;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::frame::DropReason;
use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::inherit::set_nonblocking;
use crate::link::stream::widen;
use crate::link::{FRAME_BYTES_MAX, Filled, First, LinkError, first_of, is_gone, would_block};

/// Room for the longest frame, and to see that one is longer.
const BUFFER_BYTES: usize = FRAME_BYTES_MAX + 1;
/// Who has sent so many runts shows no address any more.
const RUNTS_MAX: usize = 64;
/// Where no readiness event comes for a peer's full queue.
const RETRY_MS: u64 = 1;

/// How often the other end of a datagram socket is asked whether it is there.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// The frame that it is asked with: to the nearest bridge, which no bridge passes on (IEEE 802.1Q §8.6.3), of
/// the first type that is kept for experiments (IEEE 802 §9.2.3), and empty.
const PROBE: [u8; 60] = {
    let mut frame = [0; 60];
    let head = [0x01, 0x80, 0xc2, 0, 0, 0x0e, 2, 0, 0, 0, 0, 0, 0x88, 0xb5];
    let mut at = 0;
    while at < head.len() {
        frame[at] = head[at];
        at += 1;
    }
    frame
};

/// What the descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketKind {
    /// A TAP device or packet socket.
    Tap,
    /// A connected socket of records (`SOCK_SEQPACKET`).
    Records,
    /// A connected socket of datagrams.
    Datagrams,
}

/// A descriptor that carries whole frames.
pub struct PacketLink {
    kind: PacketKind,
    descriptor: OwnedFd,
    buffer: Box<[u8]>,
    /// The length of the frame in the buffer, if there is one.
    frame: Option<usize>,
    oversize: u64,
    /// Runts that were read to look whose link it is.
    runts: u64,
    retry: bool,
}

impl PacketLink {
    /// Over a descriptor of this kind.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub fn new(descriptor: OwnedFd, kind: PacketKind) -> io::Result<Self> {
        set_nonblocking(&descriptor)?;
        if kind != PacketKind::Tap {
            widen(&descriptor);
        }
        Ok(Self {
            kind,
            descriptor,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            frame: None,
            oversize: 0,
            runts: 0,
            retry: false,
        })
    }

    pub(super) fn transport(&self) -> &'static str {
        match self.kind {
            PacketKind::Tap => "tap",
            PacketKind::Records => "bess",
            PacketKind::Datagrams => "vfkit",
        }
    }

    pub(super) fn register(
        &mut self,
        registry: &Registry,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        SourceFd(&self.descriptor.as_raw_fd()).register(registry, token, interest)
    }

    pub(super) fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.descriptor.as_raw_fd()).deregister(registry)
    }

    pub(super) fn look(&mut self) -> Result<First, LinkError> {
        for _ in 0..RUNTS_MAX {
            if self.fill()? == Filled::Nothing {
                return Ok(First::Nobody);
            }
            let Some(length) = self.frame else { continue };
            if let Some(first) = first_of(length, &self.buffer[..length]) {
                return Ok(first);
            }
            self.frame = None;
            self.runts += 1;
        }
        Ok(First::Unknown)
    }

    pub(super) fn fill(&mut self) -> Result<Filled, LinkError> {
        if self.frame.is_some() {
            // It was read to look whose link it is.
            return Ok(Filled::Some);
        }
        match nix::unistd::read(&self.descriptor, &mut self.buffer).map_err(io::Error::from) {
            // Only a device has no empty frames: of others, this may be one, and nothing of the rest.
            Ok(0) if self.kind == PacketKind::Tap || self.is_hung_up() => Err(LinkError::Closed),
            Ok(length) if length > FRAME_BYTES_MAX => {
                self.oversize += 1;
                Ok(Filled::Some)
            }
            Ok(length) => {
                self.frame = Some(length);
                Ok(Filled::Some)
            }
            Err(error) if would_block(&error) => Ok(Filled::Nothing),
            // The namespace is going away, or the interface is down for now.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => Ok(Filled::Nothing),
            Err(error) if is_gone(&error) => Err(LinkError::Closed),
            Err(error) => Err(LinkError::Io(error)),
        }
    }

    /// Whether the other end was closed.
    fn is_hung_up(&self) -> bool {
        let mut descriptor = [PollFd::new(self.descriptor.as_fd(), PollFlags::empty())];
        // What cannot be asked is of no use either.
        poll(&mut descriptor, PollTimeout::ZERO).is_err()
            || descriptor[0]
                .revents()
                .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
    }

    pub(super) fn next_frame(&mut self) -> Option<&[u8]> {
        self.frame.take().map(|length| &self.buffer[..length])
    }

    pub(super) fn take_drops(&mut self) -> [(DropReason, u64); 2] {
        [
            (DropReason::Oversize, std::mem::take(&mut self.oversize)),
            (DropReason::Malformed, std::mem::take(&mut self.runts)),
        ]
    }

    pub(super) fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        self.retry = false;
        while let Some(frame) = queue.first_frame() {
            let length = frame.len();
            match nix::unistd::write(&self.descriptor, frame).map_err(io::Error::from) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if would_block(&error) => return Ok(false),
                // A full queue or an interface that is down loses the frame, as a cable would.
                Err(error)
                    if self.kind == PacketKind::Tap
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::ENOBUFS | libc::EIO | libc::ENETDOWN)
                        ) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.retry = true;
                    return Ok(false);
                }
                // Longer than it takes at once.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
                Err(error) if is_gone(&error) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Io(error)),
            }
            queue.consume(PREFIX_BYTES + length);
        }
        Ok(true)
    }

    pub(super) fn retry_after_ms(&self) -> Option<u64> {
        self.retry.then_some(RETRY_MS)
    }

    /// How often to ask whether it is there still: datagrams alone have no end.
    pub(super) fn alive_interval(&self) -> Option<Duration> {
        (self.kind == PacketKind::Datagrams).then_some(PROBE_INTERVAL)
    }

    /// Whether the other side is there still. Only sending tells: what is sent means nothing to anybody.
    pub(super) fn is_alive(&self) -> bool {
        self.kind != PacketKind::Datagrams
            || !nix::unistd::write(&self.descriptor, &PROBE).is_err_and(|error| is_gone(&error.into()))
    }
}
