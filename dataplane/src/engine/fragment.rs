//! Puts a guest's fragments together (RFC 791 §3.2, RFC 815; RFC 8200 §4.5), for UDP and ICMP; and takes apart
//! what was put together, for another guest.
//!
//! Bounded in datagrams, bytes and time. Overlaps throw the whole datagram away (RFC 5722 says so for
//! IPv6, and nobody honest sends them in IPv4). What comes out is parsed as one packet: no rule is asked
//! about a fragment, so that none is too small or too late to be judged.

use std::net::IpAddr;
use std::time::Duration;

use crate::engine::Time;
use crate::engine::frame::{DropReason, ETHERNET_BYTES, EtherType};
use crate::engine::ip::{IPV4_BYTES, IPV6_BYTES, Ip, Part};
use crate::engine::reply;
use crate::engine::transmit::{PREFIX_BYTES, Transmit};
use crate::mac::Mac;

/// Datagrams under way at once.
pub(super) const DATAGRAMS_MAX: usize = 32;
/// How long the fragments of one datagram may take to arrive (RFC 791: 15 s).
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// The longest payload: what an IPv4 packet has room for.
const PAYLOAD_BYTES_MAX: usize = 65_535 - IPV4_BYTES;
const MORE_FRAGMENTS: u16 = 0x2000;
/// What a packet takes in the queue beside itself.
const FRAME_BYTES: usize = PREFIX_BYTES + ETHERNET_BYTES;

/// The datagrams under way.
#[derive(Default)]
pub(super) struct Fragments {
    under_way: Vec<Datagram>,
}

struct Datagram {
    id: (IpAddr, IpAddr, u8, u32),
    ends_at: Time,
    /// The first fragment's headers, once it is there: those that the whole packet begins with.
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
    pub(super) fn handle(&mut self, now: Time, ip: &Ip<'_>) -> Result<Option<Vec<u8>>, DropReason> {
        let part = ip.part.ok_or(DropReason::Fragment)?;
        self.under_way.retain(|d| now < d.ends_at);
        // In IPv6 only the first fragment's word on what follows counts (RFC 8200 §4.5).
        let protocol = if ip.source.is_ipv4() { ip.protocol } else { 0 };
        let id = (ip.source, ip.destination, protocol, part.identification);
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
        match self.under_way[at].take(ip, part) {
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
    fn take(&mut self, ip: &Ip<'_>, part: Part) -> Option<bool> {
        let bytes = ip.payload();
        let start = usize::from(part.offset);
        let end = start + bytes.len();
        let fits = end <= PAYLOAD_BYTES_MAX && self.total.is_none_or(|total| end <= total);
        if !fits || bytes.is_empty() || (part.more && !bytes.len().is_multiple_of(8)) {
            return None;
        }
        if !part.more {
            if self.total.is_some() || self.arrived.last().is_some_and(|(_, last)| *last > end) {
                return None;
            }
            self.total = Some(end);
        }
        if start == 0 {
            self.header = ip.packet[..usize::from(part.head_bytes)].to_vec();
            self.header[usize::from(part.next_header_at)] = ip.protocol;
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

    /// The packet. One that is longer than a packet can say is none that parses.
    fn whole(mut self) -> Vec<u8> {
        let total = self.header.len() + self.payload.len();
        if self.id.0.is_ipv4() {
            mark(&mut self.header, u16::try_from(total).unwrap_or(1), 0);
        } else {
            let length = u16::try_from(total - IPV6_BYTES).unwrap_or(0);
            self.header[4..6].copy_from_slice(&length.to_be_bytes());
        }
        self.header.extend_from_slice(&self.payload);
        self.header
    }
}

/// Queues a packet in fragments that no MTU is too small for, each with the packet's own header. False when
/// there is no room for all of them.
pub(super) fn split(whole: &Ip<'_>, mtu_bytes: usize, from: Mac, out: &mut Transmit) -> bool {
    if whole.source.is_ipv6() {
        return split_ipv6(whole, mtu_bytes, from, out);
    }
    let (header, payload) = whole.packet.split_at(whole.header_bytes.into());
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

/// The same for IPv6: extension headers, which have no effect, stay behind.
fn split_ipv6(whole: &Ip<'_>, mtu_bytes: usize, from: Mac, out: &mut Transmit) -> bool {
    const FRAGMENT_BYTES: usize = 8;
    let step = (mtu_bytes.saturating_sub(IPV6_BYTES + FRAGMENT_BYTES) / 8 * 8).max(8);
    let payload = whole.payload();
    let count = payload.len().div_ceil(step);
    if !out.has_room(count * (IPV6_BYTES + FRAGMENT_BYTES + step + FRAME_BYTES)) {
        return false;
    }
    let identification = u32::from(out.next_identification());
    for (index, part) in payload.chunks(step).enumerate() {
        let more = u16::from(index + 1 < count);
        let (Ok(offset), Ok(length)) = (
            u16::try_from(index * step),
            u16::try_from(FRAGMENT_BYTES + part.len()),
        ) else {
            return false;
        };
        let total = IPV6_BYTES + FRAGMENT_BYTES + part.len();
        out.packet_from(from, EtherType::Ipv6, total, |packet| {
            let (header, rest) = packet.split_at_mut(IPV6_BYTES);
            let (fragment, room) = rest.split_at_mut(FRAGMENT_BYTES);
            header.copy_from_slice(&whole.packet[..IPV6_BYTES]);
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header[6] = reply::FRAGMENT_HEADER;
            fragment[..2].copy_from_slice(&[whole.protocol, 0]);
            fragment[2..4].copy_from_slice(&(offset | more).to_be_bytes());
            fragment[4..].copy_from_slice(&identification.to_be_bytes());
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
        fragments.handle(now, &Ip::parse(packet).unwrap())
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
        let ip = Ip::parse(&whole).unwrap();
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

    /// A fragment behind a destination options header of padding.
    fn part6(id: u8, offset: u16, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 16 + payload.len() as u8, 60, 64];
        packet.extend_from_slice(&[0xfd; 16]);
        packet.extend_from_slice(&[0x20; 16]);
        packet.extend_from_slice(&[44, 0, 1, 4, 0, 0, 0, 0]);
        let [high, low] = (offset | u16::from(more)).to_be_bytes();
        packet.extend_from_slice(&[17, 0, high, low, 0, 0, 0, id]);
        packet.extend_from_slice(payload);
        packet
    }

    #[test]
    fn ipv6_fragments_become_one_packet_without_a_fragment_header() {
        let mut fragments = Fragments::default();
        // What a later fragment says of the protocol counts for nothing.
        let mut last = part6(1, 8, false, b"end");
        last[48] = 6;
        assert_eq!(feed(&mut fragments, Time::ZERO, &last), Ok(None));
        let whole = feed(&mut fragments, Time::ZERO, &part6(1, 0, true, b"begin..."))
            .unwrap()
            .unwrap();
        let ip = Ip::parse(&whole).unwrap();
        assert!(!ip.is_fragment());
        assert_eq!((ip.protocol, ip.header_bytes), (17, 48));
        assert_eq!(ip.payload(), b"begin...end");
    }

    #[test]
    fn an_overlap_discards_an_ipv6_datagram_whole() {
        let mut fragments = Fragments::default();
        feed(&mut fragments, Time::ZERO, &part6(1, 0, true, &[1; 16])).unwrap();
        assert_eq!(
            feed(&mut fragments, Time::ZERO, &part6(1, 8, false, &[2; 16])),
            Err(DropReason::Fragment)
        );
        assert!(fragments.under_way.is_empty());
    }
}
