//! Puts a guest's IPv4 fragments together (RFC 791 §3.2, RFC 815), for UDP and ICMP; and takes apart what
//! was put together, for another guest.
//!
//! Bounded in datagrams, bytes and time. Overlaps throw the whole datagram away (RFC 5722 says so for
//! IPv6, and nobody honest sends them in IPv4).

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::engine::Time;
use crate::engine::frame::{DropReason, ETHERNET_BYTES, EtherType, Ipv4};
use crate::engine::reply;
use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::mac::Mac;

/// Datagrams under way at once.
pub(super) const DATAGRAMS_MAX: usize = 32;
/// How long the fragments of one datagram may take to arrive (RFC 791: 15 s).
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
const PAYLOAD_BYTES_MAX: usize = 65_515;
const MORE_FRAGMENTS: u16 = 0x2000;
/// What a packet takes in the queue beside itself.
const FRAME_BYTES: usize = PREFIX_BYTES + ETHERNET_BYTES;

/// The datagrams under way.
#[derive(Default)]
pub(super) struct Fragments {
    under_way: Vec<Datagram>,
}

struct Datagram {
    id: (Ipv4Addr, Ipv4Addr, u8, u16),
    ends_at: Time,
    /// The first fragment's header, once it is there.
    header: Vec<u8>,
    payload: Vec<u8>,
    /// Ranges of the payload that have arrived, in order, apart.
    arrived: Vec<(usize, usize)>,
    total: Option<usize>,
}

impl Fragments {
    /// Takes a fragment. `Ok(Some(packet))` when it was the last one missing: the whole packet, with a
    /// header that says so.
    ///
    /// # Errors
    /// [`DropReason::Fragment`] when the datagram is given up.
    pub(super) fn handle(&mut self, now: Time, part: &Ipv4<'_>) -> Result<Option<Vec<u8>>, DropReason> {
        self.under_way.retain(|d| now < d.ends_at);
        let id = (part.source, part.destination, part.protocol, part.identification);
        let at = match self.under_way.iter().position(|d| d.id == id) {
            Some(at) => at,
            None if self.under_way.len() >= DATAGRAMS_MAX => return Err(DropReason::Fragment),
            None => {
                self.under_way.push(Datagram {
                    id,
                    ends_at: now + PATIENCE,
                    header: Vec::new(),
                    payload: Vec::new(),
                    arrived: Vec::new(),
                    total: None,
                });
                self.under_way.len() - 1
            }
        };
        match self.under_way[at].take(part) {
            Some(true) => {
                let datagram = self.under_way.swap_remove(at);
                Ok(Some(datagram.whole()))
            }
            Some(false) => Ok(None),
            None => {
                self.under_way.swap_remove(at);
                Err(DropReason::Fragment)
            }
        }
    }
}

impl Datagram {
    /// Whether it is whole now; `None` when the fragment contradicts what is there.
    fn take(&mut self, part: &Ipv4<'_>) -> Option<bool> {
        let bytes = part.payload();
        let (start, end) = (part.fragment_offset, part.fragment_offset + bytes.len());
        let fits = end <= PAYLOAD_BYTES_MAX && self.total.is_none_or(|total| end <= total);
        if !fits || bytes.is_empty() || (part.more_fragments && !bytes.len().is_multiple_of(8)) {
            return None;
        }
        if !part.more_fragments {
            if self.total.is_some() || self.arrived.last().is_some_and(|(_, last)| *last > end) {
                return None;
            }
            self.total = Some(end);
        }
        if start == 0 {
            self.header = part.packet[..part.header_bytes].to_vec();
        }
        let at = self.arrived.partition_point(|(_, last)| *last <= start);
        if self.arrived.get(at).is_some_and(|(first, _)| *first < end) {
            return None;
        }
        self.arrived.insert(at, (start, end));
        if self.payload.len() < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(bytes);
        let covered: usize = self.arrived.iter().map(|(first, last)| last - first).sum();
        Some(self.total == Some(covered) && !self.header.is_empty())
    }

    fn whole(mut self) -> Vec<u8> {
        let total = u16::try_from(self.header.len() + self.payload.len()).unwrap_or(0);
        mark(&mut self.header, total, 0);
        self.header.extend_from_slice(&self.payload);
        self.header
    }
}

/// Queues a packet in fragments that no MTU is too small for, each with the packet's own header. False when
/// there is no room for all of them.
pub(super) fn split(whole: &Ipv4<'_>, mtu_bytes: usize, from: Mac, out: &mut Transmit) -> bool {
    let (header, payload) = whole.packet.split_at(whole.header_bytes);
    let step = (mtu_bytes.saturating_sub(header.len()) / 8 * 8).max(8);
    let count = payload.len().div_ceil(step);
    if !out.has_room(count * (header.len() + step + FRAME_BYTES)) {
        return false;
    }
    for (index, part) in payload.chunks(step).enumerate() {
        let more = if index + 1 < count { MORE_FRAGMENTS } else { 0 };
        let (Ok(offset), Ok(total)) = (
            u16::try_from(index * step / 8),
            u16::try_from(header.len() + part.len()),
        ) else {
            return false;
        };
        out.packet_from(from, EtherType::Ipv4, total.into(), |packet| {
            let (own, room) = packet.split_at_mut(header.len());
            own.copy_from_slice(header);
            mark(own, total, offset | more);
            room.copy_from_slice(part);
        });
    }
    true
}

/// Gives a header another length and place.
fn mark(header: &mut [u8], total: u16, flags_and_offset: u16) {
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    header[10..12].fill(0);
    let sum = reply::checksum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(id: u16, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0u8; 20];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&((20 + payload.len()) as u16).to_be_bytes());
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        let flags = (offset / 8) as u16 | if more { 0x2000 } else { 0 };
        packet[6..8].copy_from_slice(&flags.to_be_bytes());
        packet[9] = 17;
        packet.extend_from_slice(payload);
        packet
    }

    fn feed(fragments: &mut Fragments, now: Time, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
        fragments.handle(now, &Ipv4::parse(packet).unwrap())
    }

    #[test]
    fn fragments_in_any_order_become_one_packet() {
        let mut fragments = Fragments::default();
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part(1, 16, false, b"end")).unwrap(),
            None
        );
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part(1, 8, true, b"middle!!")).unwrap(),
            None
        );
        let whole = feed(&mut fragments, Time::ZERO, &part(1, 0, true, b"begin..."))
            .unwrap()
            .unwrap();
        let ip = Ipv4::parse(&whole).unwrap();
        assert!(!ip.is_fragment());
        assert_eq!(ip.payload(), b"begin...middle!!end");
    }

    #[test]
    fn overlaps_limits_and_time_end_a_datagram() {
        let mut fragments = Fragments::default();
        feed(&mut fragments, Time::ZERO, &part(1, 0, true, &[1; 16])).unwrap();
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part(1, 8, true, &[2; 8])),
            Err(DropReason::Fragment)
        );
        assert!(fragments.under_way.is_empty());
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part(2, 65_512, false, &[1; 8])),
            Err(DropReason::Fragment)
        );
        for id in 0..DATAGRAMS_MAX as u16 {
            feed(&mut fragments, Time::ZERO, &part(id, 8, true, &[1; 8])).unwrap();
        }
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part(99, 8, true, &[1; 8])),
            Err(DropReason::Fragment)
        );
        assert_eq!(
            feed(&mut fragments, PATIENCE, &part(99, 8, true, &[1; 8])),
            Ok(None)
        );
    }
}
