//! Guest links: framing only. What a frame means is the engine's.
//!
//! | link | socket | framing |
//! |---|---|---|
//! | [`stream`] (`qemu`) | Unix, TCP or vsock stream | 4-byte big-endian length, then the frame |
//! | [`stream`] (`connect`, `vpnkit`, `stdio`) | the same; two pipes | 2-byte little-endian length, then the frame |
//! | [`datagram`] (`vfkit`) | Unix datagram, shared by VMs | one frame a datagram |
//! | [`packet`] (`tap`, `bess`, `vfkit`) | TAP or packet socket, records, one VM's own datagrams | one frame a read or write |
//!
//! [`listen`] opens sockets, [`serve`] lets those in who connect to them ([`vpnkit`] after a handshake), and
//! [`shared`] those who send datagrams. Behind the [`door`] it shows whether who connects is a guest that comes back.

pub mod datagram;
pub mod door;
pub mod listen;
mod mailbox;
pub mod packet;
pub mod serve;
pub mod shared;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod vpnkit;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mio::{Interest, Registry, Token, Waker};

use crate::engine::frame::{DropReason, ETHERNET_BYTES};
use crate::engine::transmit::{Framing, Transmit};
use crate::mac::Mac;

/// Largest frame taken from a guest, bytes. Larger than any MTU: offloading hypervisors hand over
/// super-frames.
pub const FRAME_BYTES_MAX: usize = 128 << 10;

/// How often a hypervisor that sends datagrams is asked whether it is there still.
const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

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

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Link").field(&self.transport()).finish()
    }
}

/// Who speaks first on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// Nobody yet: no frame that is more than a runt.
    Nobody,
    /// The station with this address.
    Station(Mac),
    /// Somebody whose address is no station's.
    Unknown,
}

/// Who sent a frame of which at least the addresses are there. `None` of a runt.
fn first_of(length: usize, frame: &[u8]) -> Option<First> {
    let source: &[u8; 6] = frame.get(6..)?.first_chunk()?;
    let source = Mac(*source);
    (length >= ETHERNET_BYTES).then_some(if source.is_unicast() {
        First::Station(source)
    } else {
        First::Unknown
    })
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
    /// Registers the link's descriptors for both directions, edge-triggered. One without its own calls
    /// `waker` instead when something comes; [`Self::has_news`] tells then.
    ///
    /// # Errors
    /// Those of the system's poller.
    pub fn register(&mut self, registry: &Registry, token: Token, waker: &Arc<Waker>) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self {
            Self::Stream(link) => link.register(registry, token, interest),
            Self::Datagram(link) => link.register(registry, token, waker),
            Self::Packet(link) => link.register(registry, token, interest),
        }
    }

    /// Takes the link's descriptors out of a poller, so that another may have them.
    ///
    /// # Errors
    /// Those of the system's poller.
    pub fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        match self {
            Self::Stream(link) => link.deregister(registry),
            Self::Datagram(_) => Ok(()),
            Self::Packet(link) => link.deregister(registry),
        }
    }

    /// Reads until it shows who speaks, or nothing more is there. What was read is [`Self::fill`]'s and
    /// [`Self::next_frame`]'s still.
    ///
    /// # Errors
    /// [`LinkError`]: the link is over, and nobody has spoken.
    pub fn look(&mut self) -> Result<First, LinkError> {
        match self {
            Self::Stream(link) => link.look(),
            Self::Datagram(_) => Ok(First::Unknown),
            Self::Packet(link) => link.look(),
        }
    }

    /// Whether there is something to read that no readiness event tells of.
    pub fn has_news(&self) -> bool {
        match self {
            Self::Datagram(link) => link.has_news(),
            Self::Stream(_) | Self::Packet(_) => false,
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

    /// Frames that the link itself dropped since this was last asked.
    pub fn take_drops(&mut self) -> [(DropReason, u64); 2] {
        match self {
            Self::Datagram(link) => link.take_drops(),
            Self::Packet(link) => link.take_drops(),
            Self::Stream(_) => [NO_DROPS; 2],
        }
    }

    /// How long to wait before trying again to write, where no readiness event comes for it.
    pub fn retry_after_ms(&self) -> Option<u64> {
        match self {
            Self::Datagram(link) => link.retry_after_ms(),
            Self::Packet(link) => link.retry_after_ms(),
            Self::Stream(_) => None,
        }
    }

    /// How often to ask [`Self::is_alive`], for links that have no end.
    pub fn alive_interval(&self) -> Option<Duration> {
        match self {
            Self::Datagram(_) => Some(ALIVE_INTERVAL),
            Self::Packet(link) => link.alive_interval(),
            Self::Stream(_) => None,
        }
    }

    /// Whether the other side is there still.
    pub fn is_alive(&mut self) -> bool {
        match self {
            Self::Datagram(link) => link.is_alive(),
            Self::Packet(link) => link.is_alive(),
            Self::Stream(_) => true,
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
            Self::Packet(link) => link.transport(),
        }
    }
}

const NO_DROPS: (DropReason, u64) = (DropReason::Oversize, 0);

/// Whether an error says that the other side is not there any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::NotFound
            | io::ErrorKind::NotConnected
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
    )
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
