//! Guest links: framing only. What a frame means is the engine's.
//!
//! | link | socket | framing |
//! |---|---|---|
//! | [`stream`] (`qemu`) | Unix, TCP or vsock stream | 4-byte big-endian length, then the frame |
//! | [`stream`] (`connect`, `vpnkit`, `stdio`) | the same; two pipes | 2-byte little-endian length, then the frame |
//! | [`datagram`] (`vfkit`) | Unix datagram | one frame a datagram |
//! | [`packet`] (`tap`) | TAP or packet socket | one frame a read or write |

pub mod datagram;
pub mod listen;
pub mod packet;
pub mod stream;

use std::io;

use mio::{Interest, Registry, Token};

use crate::engine::transmit::{Framing, Transmit};

/// Largest frame taken from a guest, bytes. Larger than any MTU: offloading hypervisors hand over
/// super-frames.
pub const FRAME_BYTES_MAX: usize = 128 << 10;

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The other side closed it.
    #[error("the hypervisor closed the connection")]
    Closed,
    /// A frame length that no hypervisor sends; the stream cannot be followed any further.
    #[error("a frame of {0} bytes was announced (at most {FRAME_BYTES_MAX})")]
    Oversize(usize),
    /// The system says so.
    #[error("the guest's socket failed")]
    Io(#[source] io::Error),
}

/// A guest's link.
pub enum Link {
    /// A stream of framed frames.
    Stream(stream::StreamLink),
    /// Datagrams.
    Datagram(datagram::DatagramLink),
    /// A TAP or packet socket.
    Packet(packet::PacketLink),
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Something; there may be more.
    Some,
    /// Nothing now; the next readiness event says when.
    Nothing,
}

impl Link {
    /// Registers the link's descriptor for both directions, edge-triggered.
    ///
    /// # Errors
    /// Those of the system's poller.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self {
            Self::Stream(link) => link.register(registry, token, interest),
            Self::Datagram(link) => link.register(registry, token, interest),
            Self::Packet(link) => link.register(registry, token, interest),
        }
    }

    /// Reads once. Frames are then taken by [`Self::next_frame`].
    ///
    /// # Errors
    /// [`LinkError`]: the link is over.
    pub fn fill(&mut self) -> Result<Filled, LinkError> {
        match self {
            Self::Stream(link) => link.fill(),
            Self::Datagram(link) => link.fill(),
            Self::Packet(link) => link.fill(),
        }
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// [`LinkError`]: the link is over.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, LinkError> {
        match self {
            Self::Stream(link) => link.next_frame(),
            Self::Datagram(link) => Ok(link.next_frame()),
            Self::Packet(link) => Ok(link.next_frame()),
        }
    }

    /// Writes what is queued. True when everything went out; false when the link would block, and
    /// the next readiness event (or [`Self::retry_after_ms`]) says when to go on.
    ///
    /// # Errors
    /// [`LinkError`]: the link is over.
    pub fn flush(&mut self, queue: &mut Transmit) -> Result<bool, LinkError> {
        match self {
            Self::Stream(link) => link.flush(queue),
            Self::Datagram(link) => link.flush(queue),
            Self::Packet(link) => link.flush(queue),
        }
    }

    /// How many frames of others than the adopted hypervisor came since this was last asked.
    pub fn take_strangers(&mut self) -> u64 {
        match self {
            Self::Datagram(link) => link.take_strangers(),
            Self::Stream(_) | Self::Packet(_) => 0,
        }
    }

    /// How long to wait before trying again to write, where no readiness event comes for it.
    pub fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::Datagram(link) => link.retry_after_ms(),
            Self::Stream(_) | Self::Packet(_) => None,
        }
    }

    /// Whether the other side is still there, for links that have no end of stream. To be asked about
    /// once a second when nothing came.
    pub fn is_alive(&mut self) -> bool {
        match self {
            Self::Datagram(link) => link.is_alive(),
            Self::Stream(_) | Self::Packet(_) => true,
        }
    }

    /// How frames are to be queued for it.
    pub fn framing(&self) -> Framing {
        match self {
            Self::Stream(link) => link.framing(),
            // The length is skipped.
            Self::Datagram(_) | Self::Packet(_) => Framing::Be32,
        }
    }

    /// What hypervisors call it.
    pub fn transport(&self) -> &'static str {
        match self {
            Self::Stream(link) => link.transport(),
            Self::Datagram(_) => "vfkit",
            Self::Packet(_) => "tap",
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
