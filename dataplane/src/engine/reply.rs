//! Packets that the gateway makes itself: RST, ICMP errors and echoes, UDP datagrams; over IPv4 or IPv6, as
//! the addresses say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::engine::frame::EtherType;
use crate::engine::ip::{IPV4_BYTES, IPV6_BYTES, Ip};
use crate::engine::transmit::Transmit;
use crate::mac::Mac;

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
/// ICMP's protocol number.
pub const ICMP: u8 = 1;
/// ICMPv6's protocol number.
pub const ICMPV6: u8 = 58;

const TTL_HOPS: u8 = 64;
/// What says that a packet of neighbour discovery has crossed no router (RFC 4861 §3.1).
pub const ON_LINK_HOPS: u8 = 255;
const TCP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
const ICMP_BYTES: usize = 8;
/// An IPv6 fragment header, bytes.
const FRAGMENT_BYTES: usize = 8;
/// What announces it.
pub(super) const FRAGMENT_HEADER: u8 = 44;

/// Why a destination could not be reached, as ICMP type 3 (RFC 792, RFC 1122 §3.2.2.1) and ICMPv6 type 1
/// (RFC 4443 §3.1) say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// No way to the network: code 0 of both.
    Network,
    /// No way to the host: code 1; in IPv6 code 3, address unreachable.
    Host,
    /// Nobody at that port: code 3; in IPv6 code 4.
    Port,
    /// Communication administratively prohibited: code 13 (RFC 1812 §5.2.7.1); in IPv6 code 1.
    Prohibited,
}

impl Unreachable {
    /// Type and code.
    fn of_family(self, is_ipv4: bool) -> [u8; 2] {
        match (self, is_ipv4) {
            (Self::Network, true) => [3, 0],
            (Self::Host, true) => [3, 1],
            (Self::Port, true) => [3, 3],
            (Self::Prohibited, true) => [3, 13],
            (Self::Network, false) => [1, 0],
            (Self::Prohibited, false) => [1, 1],
            (Self::Host, false) => [1, 3],
            (Self::Port, false) => [1, 4],
        }
    }
}

/// A TCP segment's header, as far as deciding needs it.
#[derive(Debug, Clone, Copy)]
pub struct TcpHeader {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Flags: FIN 1, SYN 2, RST 4, PSH 8, ACK 16.
    pub flags: u8,
    /// Bytes of sequence space it takes, SYN and FIN included.
    pub sequence_bytes: u32,
}

impl TcpHeader {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// ACK.
    pub const ACK: u8 = 16;

    /// Bytes of the stream that the segment carries.
    pub fn payload_bytes(&self) -> u32 {
        self.sequence_bytes.saturating_sub(Self::marks(self.flags))
    }

    /// How many of SYN and FIN it has: each takes a place in sequence space.
    fn marks(flags: u8) -> u32 {
        u32::from(flags & Self::SYN != 0) + u32::from(flags & Self::FIN != 0)
    }

    /// Reads a segment's header; `None` when it is cut short.
    pub fn parse(segment: &[u8]) -> Option<Self> {
        let header = segment.first_chunk::<TCP_BYTES>()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        let payload = segment.len().checked_sub(header_bytes.max(TCP_BYTES))?;
        if header_bytes < TCP_BYTES {
            return None;
        }
        let flags = header[13];
        Some(Self {
            source: u16::from_be_bytes([header[0], header[1]]),
            destination: u16::from_be_bytes([header[2], header[3]]),
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            acknowledgement: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
            flags,
            sequence_bytes: u32::try_from(payload)
                .unwrap_or(u32::MAX)
                .saturating_add(Self::marks(flags)),
        })
    }

    /// Whether it opens a connection.
    pub fn is_syn(&self) -> bool {
        self.flags & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }

    /// Whether its flags contradict each other: what opens a connection neither closes nor resets one. No stack
    /// sends such a segment, and filters that look for one flag alone have been passed by with it.
    pub fn is_contradictory(&self) -> bool {
        self.flags & Self::SYN != 0 && self.flags & (Self::FIN | Self::RST) != 0
    }

    /// Whether it resets one.
    pub fn is_reset(&self) -> bool {
        self.flags & Self::RST != 0
    }
}

/// A SYN as it is kept while its flow waits: its packet without the bytes of the stream that it may carry, with
/// lengths and checksums that say so. They count as never arrived and are sent again (RFC 7413 §3 lets a server do
/// so); kept, they would be a frame's worth for each flow that a guest can begin.
pub fn kept_syn(ip: &Ip<'_>) -> Box<[u8]> {
    let segment = ip.payload();
    let tcp_bytes = segment.get(12).map_or(0, |b| usize::from(b >> 4) * 4);
    let header_bytes = usize::from(ip.header_bytes);
    let total = header_bytes + tcp_bytes;
    if tcp_bytes < TCP_BYTES || total >= ip.packet.len() {
        return ip.packet.into();
    }
    let mut packet: Box<[u8]> = ip.packet[..total].into();
    match ip.source {
        IpAddr::V4(_) => {
            packet[2..4].copy_from_slice(&u16::try_from(total).unwrap_or(u16::MAX).to_be_bytes());
            packet[10..12].fill(0);
            let sum = fold(word_sum(&packet[..header_bytes]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(_) => {
            let length = u16::try_from(total - IPV6_BYTES).unwrap_or(u16::MAX);
            packet[4..6].copy_from_slice(&length.to_be_bytes());
        }
    }
    let segment = &mut packet[header_bytes..];
    segment[16..18].fill(0);
    let sum = pseudo_header_sum(ip.source, ip.destination, TCP, tcp_bytes) + word_sum(segment);
    segment[16..18].copy_from_slice(&fold(sum).to_be_bytes());
    packet
}

/// Queues the RST that answers a segment (RFC 9293 §3.10.7.1); nothing for a RST.
pub fn reset(out: &mut Transmit, to: IpAddr, from: IpAddr, header: &TcpHeader) {
    if header.is_reset() {
        return;
    }
    let (sequence, acknowledgement, flags) = if header.flags & TcpHeader::ACK != 0 {
        (header.acknowledgement, 0, TcpHeader::RST)
    } else {
        (
            0,
            header.sequence.wrapping_add(header.sequence_bytes),
            TcpHeader::RST | TcpHeader::ACK,
        )
    };
    let from = SocketAddr::new(from, header.destination);
    let to = SocketAddr::new(to, header.source);
    bare_segment(out, from, to, sequence, acknowledgement, flags);
}

/// Queues a RST of a connection that is cut, from a peer that does not know of it.
pub fn abort(
    out: &mut Transmit,
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledgement: Option<u32>,
) {
    let flags = acknowledgement.map_or(TcpHeader::RST, |_| TcpHeader::RST | TcpHeader::ACK);
    bare_segment(out, from, to, sequence, acknowledgement.unwrap_or(0), flags);
}

/// A segment of nothing but its header.
fn bare_segment(
    out: &mut Transmit,
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
) {
    packet(out, from.ip(), to.ip(), TCP, TCP_BYTES, |segment| {
        segment.fill(0);
        segment[..2].copy_from_slice(&from.port().to_be_bytes());
        segment[2..4].copy_from_slice(&to.port().to_be_bytes());
        segment[4..8].copy_from_slice(&sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
        segment[12] = 5 << 4;
        segment[13] = flags;
        let sum = pseudo_header_sum(from.ip(), to.ip(), TCP, TCP_BYTES) + word_sum(segment);
        segment[16..18].copy_from_slice(&fold(sum).to_be_bytes());
    });
}

/// Queues an ICMP destination-unreachable that quotes a guest's packet
/// ([`Ip::quote`](crate::engine::ip::Ip::quote)).
pub fn unreachable(out: &mut Transmit, gateway: IpAddr, guest: IpAddr, quote: &[u8], why: Unreachable) {
    let protocol = icmp_of(guest);
    let length = ICMP_BYTES + quote.len();
    packet(out, gateway, guest, protocol, length, |message| {
        message[..ICMP_BYTES].fill(0);
        message[..2].copy_from_slice(&why.of_family(guest.is_ipv4()));
        message[ICMP_BYTES..].copy_from_slice(quote);
        finish_icmp(gateway, guest, message);
    });
}

/// The same for a datagram that was passed on whole: its header is made again for the quote.
pub fn unreachable_for_udp(
    out: &mut Transmit,
    gateway: IpAddr,
    guest: SocketAddr,
    peer: SocketAddr,
    why: Unreachable,
) {
    let mut quote = [0; IPV6_BYTES + UDP_BYTES];
    let header_bytes = match (guest.ip(), peer.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            write_ipv4(&mut quote[..IPV4_BYTES], from, to, UDP, UDP_BYTES, 0, 0);
            IPV4_BYTES
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            write_ipv6(&mut quote[..IPV6_BYTES], from, to, UDP, UDP_BYTES, TTL_HOPS);
            IPV6_BYTES
        }
        _ => return,
    };
    let udp = &mut quote[header_bytes..header_bytes + UDP_BYTES];
    udp[..2].copy_from_slice(&guest.port().to_be_bytes());
    udp[2..4].copy_from_slice(&peer.port().to_be_bytes());
    udp[5] = UDP_BYTES as u8;
    unreachable(out, gateway, guest.ip(), &quote[..header_bytes + UDP_BYTES], why);
}

/// Queues an ICMP or ICMPv6 message from the host's side with its checksum made anew.
pub fn icmp(out: &mut Transmit, from: IpAddr, to: IpAddr, message: &[u8], mtu_bytes: usize) -> bool {
    if message.len() < ICMP_BYTES {
        return true;
    }
    fragmented(out, from, to, icmp_of(to), message.len(), mtu_bytes, |packet| {
        packet.copy_from_slice(message);
        finish_icmp(from, to, packet);
    })
}

/// Queues a message of neighbour discovery, to the MAC address of its multicast group (RFC 2464 §7) where
/// that is whom it is for, from the MAC address that it is about. False when there was no room.
pub fn discovery(out: &mut Transmit, source: Mac, from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> bool {
    let [.., a, b, c, d] = to.octets();
    let mac = if to.is_multicast() {
        Mac([0x33, 0x33, a, b, c, d])
    } else {
        out.guest
    };
    let length = IPV6_BYTES + message.len();
    out.packet_between(source, mac, EtherType::Ipv6, length, |packet| {
        let (header, room) = packet.split_at_mut(IPV6_BYTES);
        write_ipv6(header, from, to, ICMPV6, message.len(), ON_LINK_HOPS);
        room.copy_from_slice(message);
        finish_icmp(from.into(), to.into(), room);
    })
    .is_some()
}

/// Queues a UDP datagram. False when there was no room.
pub fn udp(out: &mut Transmit, from: SocketAddr, to: SocketAddr, payload: &[u8], mtu_bytes: usize) -> bool {
    let length = UDP_BYTES + payload.len();
    let Ok(wire_length) = u16::try_from(length) else {
        return true;
    };
    fragmented(out, from.ip(), to.ip(), UDP, length, mtu_bytes, |datagram| {
        datagram[..2].copy_from_slice(&from.port().to_be_bytes());
        datagram[2..4].copy_from_slice(&to.port().to_be_bytes());
        datagram[4..6].copy_from_slice(&wire_length.to_be_bytes());
        datagram[6..8].fill(0);
        datagram[8..].copy_from_slice(payload);
        let sum = fold(pseudo_header_sum(from.ip(), to.ip(), UDP, length) + word_sum(datagram));
        // Zero means "no checksum" (RFC 768), which IPv6 does not take (RFC 8200 §8.1).
        let sum = if sum == 0 { 0xffff } else { sum };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    })
}

/// The protocol number of ICMP between such addresses.
fn icmp_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => ICMP,
        IpAddr::V6(_) => ICMPV6,
    }
}

/// Makes a message's checksum; ICMPv6 has one over its addresses too (RFC 4443 §2.3).
fn finish_icmp(from: IpAddr, to: IpAddr, message: &mut [u8]) {
    message[2..4].fill(0);
    let addresses = match to {
        IpAddr::V4(_) => 0,
        IpAddr::V6(_) => pseudo_header_sum(from, to, ICMPV6, message.len()),
    };
    let sum = fold(addresses + word_sum(message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
}

/// One packet where it fits the MTU, else fragments (RFC 791 §3.2, RFC 8200 §4.5).
fn fragmented(
    out: &mut Transmit,
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    payload_bytes: usize,
    mtu_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    let (header_bytes, fragment_bytes) = match to {
        IpAddr::V4(_) => (IPV4_BYTES, 0),
        IpAddr::V6(_) => (IPV6_BYTES, FRAGMENT_BYTES),
    };
    if header_bytes + payload_bytes <= mtu_bytes {
        return packet(out, from, to, protocol, payload_bytes, fill);
    }
    let mut payload = vec![0; payload_bytes];
    fill(&mut payload);
    let step = (mtu_bytes - header_bytes - fragment_bytes) / 8 * 8;
    let fragments = payload_bytes.div_ceil(step);
    if !out.has_room(fragments * (mtu_bytes + 32)) {
        return false;
    }
    let identification = out.next_identification();
    for (index, part) in payload.chunks(step).enumerate() {
        let (offset, more) = (index * step, index + 1 < fragments);
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let more = if more { 0x2000 } else { 0 };
                let flags = u16::try_from(offset / 8).unwrap_or(0) | more;
                ipv4(
                    out,
                    from,
                    to,
                    protocol,
                    part.len(),
                    identification,
                    flags,
                    |room| {
                        room.copy_from_slice(part);
                    },
                );
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let length = FRAGMENT_BYTES + part.len();
                ipv6(out, from, to, FRAGMENT_HEADER, length, |room| {
                    let (header, room) = room.split_at_mut(FRAGMENT_BYTES);
                    let offset = u16::try_from(offset).unwrap_or(0) | u16::from(more);
                    header[..2].copy_from_slice(&[protocol, 0]);
                    header[2..4].copy_from_slice(&offset.to_be_bytes());
                    header[4..].copy_from_slice(&u32::from(identification).to_be_bytes());
                    room.copy_from_slice(part);
                });
            }
            _ => {}
        }
    }
    true
}

/// One packet that nobody takes apart. Addresses of two families are nobody's, and nothing is lost.
fn packet(
    out: &mut Transmit,
    from: IpAddr,
    to: IpAddr,
    protocol: u8,
    payload_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    const DO_NOT_FRAGMENT: u16 = 0x4000;
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            ipv4(out, from, to, protocol, payload_bytes, 0, DO_NOT_FRAGMENT, fill)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(out, from, to, protocol, payload_bytes, fill),
        _ => true,
    }
}

#[expect(clippy::too_many_arguments, reason = "the fields of a header")]
fn ipv4(
    out: &mut Transmit,
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload_bytes: usize,
    identification: u16,
    flags_and_offset: u16,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    if u16::try_from(IPV4_BYTES + payload_bytes).is_err() {
        return true;
    }
    out.packet(EtherType::Ipv4, IPV4_BYTES + payload_bytes, |packet| {
        let (header, payload) = packet.split_at_mut(IPV4_BYTES);
        write_ipv4(
            header,
            from,
            to,
            protocol,
            payload_bytes,
            identification,
            flags_and_offset,
        );
        fill(payload);
    })
    .is_some()
}

fn write_ipv4(
    header: &mut [u8],
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload_bytes: usize,
    identification: u16,
    flags_and_offset: u16,
) {
    // The caller has seen to it that it fits.
    let total = u16::try_from(IPV4_BYTES + payload_bytes).unwrap_or(u16::MAX);
    header.fill(0);
    header[0] = 0x45;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[4..6].copy_from_slice(&identification.to_be_bytes());
    header[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    header[8] = TTL_HOPS;
    header[9] = protocol;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = fold(word_sum(header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn ipv6(
    out: &mut Transmit,
    from: Ipv6Addr,
    to: Ipv6Addr,
    protocol: u8,
    payload_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    if u16::try_from(payload_bytes).is_err() {
        return true;
    }
    out.packet(EtherType::Ipv6, IPV6_BYTES + payload_bytes, |packet| {
        let (header, payload) = packet.split_at_mut(IPV6_BYTES);
        write_ipv6(header, from, to, protocol, payload_bytes, TTL_HOPS);
        fill(payload);
    })
    .is_some()
}

fn write_ipv6(header: &mut [u8], from: Ipv6Addr, to: Ipv6Addr, protocol: u8, payload_bytes: usize, hops: u8) {
    // The caller has seen to it that it fits.
    let length = u16::try_from(payload_bytes).unwrap_or(u16::MAX);
    header[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header[6..8].copy_from_slice(&[protocol, hops]);
    header[8..24].copy_from_slice(&from.octets());
    header[24..40].copy_from_slice(&to.octets());
}

/// The sum of what a checksum covers beside the packet itself (RFC 9293 §3.1, RFC 8200 §8.1).
fn pseudo_header_sum(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> u64 {
    let sum = |address: IpAddr| match address {
        IpAddr::V4(v4) => word_sum(&v4.octets()),
        IpAddr::V6(v6) => word_sum(&v6.octets()),
    };
    sum(from) + sum(to) + u64::from(protocol) + length as u64
}

/// The checksum of a header whose own field is zero (RFC 1071).
pub(super) fn checksum(header: &[u8]) -> u16 {
    fold(word_sum(header))
}

/// The ones' complement sum of big-endian words (RFC 1071), not folded.
fn word_sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<2>();
    let sum: u64 = words.iter().map(|w| u64::from(u16::from_be_bytes(*w))).sum();
    sum + tail.first().map_or(0, |b| u64::from(*b) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, Icmpv6Repr, Ipv4Packet, TcpPacket, UdpPacket};

    use super::*;

    const GUEST: [IpAddr; 2] = [
        IpAddr::V4(Ipv4Addr::new(192, 168, 127, 2)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
    ];
    const PEER: [IpAddr; 2] = [
        IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9)),
    ];

    fn queue() -> Transmit {
        Transmit::new(Mac([2; 6]))
    }

    #[test]
    fn a_syn_is_refused_with_the_right_acknowledgement() {
        for (guest, peer) in GUEST.into_iter().zip(PEER) {
            let mut out = queue();
            let syn = TcpHeader {
                source: 40000,
                destination: 80,
                sequence: u32::MAX,
                acknowledgement: 0,
                flags: TcpHeader::SYN,
                sequence_bytes: 1,
            };
            reset(&mut out, guest, peer, &syn);
            let frame = out.first_frame().unwrap();
            let ip = Ip::parse(&frame[14..]).unwrap();
            assert_eq!((ip.source, ip.destination), (peer, guest));
            assert!(peer.is_ipv6() || Ipv4Packet::new_checked(ip.packet).unwrap().verify_checksum());
            let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
            assert!(tcp.verify_checksum(&peer.into(), &guest.into()));
            assert!(tcp.rst() && tcp.ack());
            assert_eq!(
                (tcp.src_port(), tcp.dst_port(), tcp.ack_number().0),
                (80, 40000, 0)
            );
        }
    }

    #[test]
    fn large_datagrams_leave_in_fragments_that_add_up() {
        for (guest, peer) in GUEST.into_iter().zip(PEER) {
            let mut out = queue();
            let payload: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
            let (from, to) = (SocketAddr::new(peer, 53), SocketAddr::new(guest, 5353));
            assert!(udp(&mut out, from, to, &payload, 1500));
            let mut whole = vec![0; 5008];
            let mut seen = 0;
            while let Some(frame) = out.first_frame() {
                let length = frame.len();
                let ip = Ip::parse(&frame[14..]).unwrap();
                let part = ip.part.unwrap();
                assert!(ip.packet.len() <= 1500);
                assert!(peer.is_ipv6() || Ipv4Packet::new_checked(ip.packet).unwrap().verify_checksum());
                let offset = usize::from(part.offset);
                assert_eq!(part.more, offset + ip.payload().len() < 5008);
                whole[offset..offset + ip.payload().len()].copy_from_slice(ip.payload());
                seen += ip.payload().len();
                out.consume(4 + length);
            }
            assert_eq!(seen, 5008);
            let datagram = UdpPacket::new_checked(&whole).unwrap();
            assert!(datagram.verify_checksum(&peer.into(), &guest.into()));
            assert_eq!(datagram.payload(), payload);
        }
    }

    #[test]
    fn unreachable_quotes_what_it_is_about() {
        for (guest, peer) in GUEST.into_iter().zip(PEER) {
            let mut out = queue();
            let (from, to) = (SocketAddr::new(guest, 9), SocketAddr::new(peer, 9));
            udp(&mut out, from, to, &[7; 1300], 1500);
            let frame = out.first_frame().unwrap().to_vec();
            out.clear();
            let cause = Ip::parse(&frame[14..]).unwrap();
            unreachable(&mut out, peer, guest, cause.quote(), Unreachable::Prohibited);
            let answer = out.first_frame().unwrap();
            let ip = Ip::parse(&answer[14..]).unwrap();
            if peer.is_ipv4() {
                let message = Icmpv4Packet::new_checked(ip.payload()).unwrap();
                assert!(message.verify_checksum());
                assert_eq!((u8::from(message.msg_type()), message.msg_code()), (3, 13));
                assert_eq!(ip.payload().len(), 8 + 28);
            } else {
                assert_eq!(ip.payload()[..2], [1, 1]);
                assert_eq!(ip.packet.len(), 1280, "no longer than any link carries");
                checked6(&ip);
            }
        }
    }

    #[test]
    fn a_datagram_that_was_passed_on_is_quoted_by_its_addresses() {
        for (guest, peer) in GUEST.into_iter().zip(PEER) {
            let mut out = queue();
            let (from, to) = (SocketAddr::new(guest, 4000), SocketAddr::new(peer, 123));
            unreachable_for_udp(&mut out, peer, from, to, Unreachable::Port);
            let answer = out.first_frame().unwrap();
            let ip = Ip::parse(&answer[14..]).unwrap();
            assert_eq!(ip.payload()[..2], Unreachable::Port.of_family(peer.is_ipv4()));
            let quoted = Ip::parse(&ip.payload()[8..]).unwrap();
            assert_eq!((quoted.source, quoted.destination), (guest, peer));
            assert_eq!(quoted.payload()[..4], [0x0f, 0xa0, 0, 123]);
        }
    }

    /// Verifies an ICMPv6 message's checksum.
    fn checked6(ip: &Ip<'_>) {
        let (IpAddr::V6(from), IpAddr::V6(to)) = (ip.source, ip.destination) else {
            panic!("not IPv6")
        };
        let message = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        Icmpv6Repr::parse(&from, &to, &message, &ChecksumCapabilities::default()).unwrap();
    }
}
