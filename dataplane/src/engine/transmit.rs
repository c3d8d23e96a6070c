//! The queue of frames towards a guest: one fixed buffer, filled in place, flushed in one write.
//!
//! Each frame stands behind its length in the [`Framing`] of the link's stream, so that a stream link
//! writes the queue as it is; datagram links and TAPs skip it. Frames are never dropped here: when there
//! is no room, the producer waits (a TCP flow goes on the blocked list) or drops what it has itself.

use crate::engine::frame::{ETHERNET_BYTES, EtherType};
use crate::mac::Mac;

/// Room for frames not yet written, bytes. More would outrun the socket buffers behind it.
pub const QUEUE_BYTES: usize = 1 << 20;
/// Length prefix in front of each frame, bytes: that of [`Framing::Be32`], and more than any other's.
pub const PREFIX_BYTES: usize = 4;

/// How long a frame is, in front of it on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// 4 bytes, big-endian: QEMU's `-netdev stream`. Also what links that are no stream queue behind.
    Be32,
    /// 2 bytes, little-endian: `/connect`, vpnkit, standard input and output.
    Le16,
}

impl Framing {
    /// Bytes of a length.
    pub const fn prefix_bytes(self) -> usize {
        match self {
            Self::Be32 => size_of::<u32>(),
            Self::Le16 => size_of::<u16>(),
        }
    }

    /// The longest frame that it can say, bytes.
    pub const fn frame_bytes_max(self) -> usize {
        match self {
            Self::Be32 => u32::MAX as usize,
            Self::Le16 => u16::MAX as usize,
        }
    }

    /// Takes a length off the front of what was read. `None` when it is not all there.
    pub fn split_length(self, read: &[u8]) -> Option<(usize, &[u8])> {
        match self {
            Self::Be32 => {
                let (prefix, rest) = read.split_first_chunk()?;
                Some((u32::from_be_bytes(*prefix) as usize, rest))
            }
            Self::Le16 => {
                let (prefix, rest) = read.split_first_chunk()?;
                Some((u16::from_le_bytes(*prefix).into(), rest))
            }
        }
    }
}

/// Frames towards a guest.
pub struct Transmit {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Where the frames begin that captures have not been shown; of no meaning while nothing is captured.
    seen: usize,
    framing: Framing,
    /// There is no link, and no room.
    closed: bool,
    /// Ethernet addresses put in front of every packet: to the guest, from the gateway.
    pub guest: Mac,
    gateway: Mac,
    identification: u16,
}

impl Transmit {
    /// An empty queue of frames from `gateway`, in [`Framing::Be32`].
    pub fn new(gateway: Mac) -> Self {
        Self {
            buffer: vec![0; QUEUE_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            seen: 0,
            framing: Framing::Be32,
            closed: false,
            guest: Mac::BROADCAST,
            gateway,
            identification: 0,
        }
    }

    /// Frames stand behind lengths of this framing from now on. What was queued is forgotten: it is of
    /// another, and of another link.
    pub fn set_framing(&mut self, framing: Framing) {
        self.clear();
        self.framing = framing;
        self.closed = false;
    }

    /// The link is gone: forgets what was queued, and has no room until there is another
    /// ([`Self::set_framing`]). So TCP waits, rather than sends and loses; it repeats what was lost as soon as it may
    /// send again.
    pub fn close(&mut self) {
        self.clear();
        self.closed = true;
    }

    /// Whether there is no link.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The longest frame that can be queued, bytes.
    pub fn frame_bytes_max(&self) -> usize {
        self.framing.frame_bytes_max()
    }

    /// Whether a packet of so many bytes (without its Ethernet header) fits.
    pub fn has_room(&self, packet_bytes: usize) -> bool {
        !self.closed && self.buffer.len() - self.end >= PREFIX_BYTES + ETHERNET_BYTES + packet_bytes
    }

    /// Queues a packet to the guest's own MAC, written in place by `fill`. `None` when there is no room.
    pub fn packet<R>(
        &mut self,
        ether_type: EtherType,
        packet_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        self.packet_from(self.gateway, ether_type, packet_bytes, fill)
    }

    /// Queues a packet to the guest's own MAC that comes from another than the gateway's. `None` when there
    /// is no room.
    pub fn packet_from<R>(
        &mut self,
        from: Mac,
        ether_type: EtherType,
        packet_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        self.packet_between(from, self.guest, ether_type, packet_bytes, fill)
    }

    /// Queues a packet from one MAC to another. `None` when there is no room.
    pub fn packet_between<R>(
        &mut self,
        from: Mac,
        to: Mac,
        ether_type: EtherType,
        packet_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        self.room_between(from, to, ether_type, packet_bytes).map(fill)
    }

    /// Room for a packet to the guest's own MAC, queued as soon as it is taken.
    pub fn room(&mut self, ether_type: EtherType, packet_bytes: usize) -> Option<&mut [u8]> {
        self.room_between(self.gateway, self.guest, ether_type, packet_bytes)
    }

    fn room_between(
        &mut self,
        from: Mac,
        to: Mac,
        ether_type: EtherType,
        packet_bytes: usize,
    ) -> Option<&mut [u8]> {
        let frame = self.reserve(ETHERNET_BYTES + packet_bytes)?;
        frame[..6].copy_from_slice(&to.0);
        frame[6..12].copy_from_slice(&from.0);
        frame[12..14].copy_from_slice(&u16::from(ether_type).to_be_bytes());
        Some(&mut frame[ETHERNET_BYTES..])
    }

    /// Queues a whole frame, as another guest sent it. False when there is no room.
    pub fn frame(&mut self, frame: &[u8]) -> bool {
        match self.reserve(frame.len()) {
            Some(room) => {
                room.copy_from_slice(frame);
                true
            }
            None => false,
        }
    }

    fn reserve(&mut self, frame_bytes: usize) -> Option<&mut [u8]> {
        match self.framing {
            Framing::Be32 => self.reserve_behind(u32::try_from(frame_bytes).ok()?.to_be_bytes(), frame_bytes),
            Framing::Le16 => self.reserve_behind(u16::try_from(frame_bytes).ok()?.to_le_bytes(), frame_bytes),
        }
    }

    fn reserve_behind<const N: usize>(&mut self, length: [u8; N], frame_bytes: usize) -> Option<&mut [u8]> {
        let next = self
            .end
            .checked_add(N + frame_bytes)
            .filter(|n| !self.closed && *n <= self.buffer.len())?;
        let (prefix, room) = self.buffer[self.end..next].split_first_chunk_mut()?;
        *prefix = length;
        self.end = next;
        Some(room)
    }

    /// A fresh identification for a packet that leaves in fragments (RFC 6864 §4.2).
    pub fn next_identification(&mut self) -> u16 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Everything queued, prefixes included: what a stream link writes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The first whole frame queued, without its prefix: what a datagram link writes. Not to be
    /// mixed with a stream's partial writes.
    pub fn first_frame(&self) -> Option<&[u8]> {
        let (length, rest) = self.framing.split_length(self.bytes())?;
        rest.get(..length)
    }

    /// Takes so many bytes off the front, prefixes included.
    pub fn consume(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
        if self.start == self.end {
            (self.start, self.end, self.seen) = (0, 0, 0);
        } else if self.start > self.buffer.len() / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.seen = self.seen.saturating_sub(self.start);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Forgets everything queued: the link it was for is gone.
    pub fn clear(&mut self) {
        (self.start, self.end, self.seen) = (0, 0, 0);
    }

    /// Shows each frame that was queued since this was last called, without its length. To be called before what is
    /// queued is consumed.
    pub fn see(&mut self, mut show: impl FnMut(&[u8])) {
        let mut unseen = self.buffer.get(self.seen..self.end).unwrap_or_default();
        while let Some((length, rest)) = self.framing.split_length(unseen) {
            let Some((frame, rest)) = rest.split_at_checked(length) else {
                break;
            };
            show(frame);
            unseen = rest;
        }
        self.seen = self.end;
    }

    /// What is queued now is not shown by [`Self::see`].
    pub fn skip_unseen(&mut self) {
        self.seen = self.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_and_in_order() {
        let mut queue = Transmit::new(Mac([2, 0, 0, 0, 0, 1]));
        queue.guest = Mac([2, 0, 0, 0, 0, 2]);
        queue
            .packet(EtherType::Ipv4, 3, |room| room.copy_from_slice(b"abc"))
            .unwrap();
        assert!(queue.frame(b"whole frame"));
        assert_eq!(
            queue.first_frame().unwrap(),
            b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01\x08\0abc"
        );
        queue.consume(PREFIX_BYTES + 17);
        assert_eq!(queue.first_frame().unwrap(), b"whole frame");
        queue.consume(PREFIX_BYTES + 11);
        assert!(queue.is_empty() && queue.first_frame().is_none());
    }

    #[test]
    fn short_lengths_stand_in_front_of_frames_where_the_link_has_them() {
        let mut queue = Transmit::new(Mac::BROADCAST);
        assert!(queue.frame(b"of the link before"));
        queue.set_framing(Framing::Le16);
        assert!(queue.frame(&[7; 258]) && queue.frame(b"ab"));
        assert_eq!(queue.bytes()[..3], [2, 1, 7]);
        assert_eq!(queue.bytes()[260..], [2, 0, b'a', b'b']);
        assert_eq!(queue.first_frame().unwrap(), [7; 258]);
        assert!(queue.frame(&[7; 65_535]));
        assert!(!queue.frame(&[7; 65_536]), "it cannot say how long that is");
        assert_eq!(queue.bytes().len(), 260 + 4 + 65_537);
    }

    #[test]
    fn a_full_queue_refuses_and_takes_again_once_drained() {
        let mut queue = Transmit::new(Mac::BROADCAST);
        let mut taken = 0;
        while queue.frame(&[7; 65_000]) {
            taken += 1;
        }
        assert_eq!(taken, QUEUE_BYTES / 65_004);
        assert!(!queue.has_room(65_000) && queue.has_room(10));
        queue.consume(65_004 * 9);
        assert!(queue.frame(&[8; 65_000]));
        assert_eq!(queue.first_frame().unwrap().len(), 65_000);
    }
}
