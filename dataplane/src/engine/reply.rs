//! Packets that the gateway makes itself: RST, ICMP errors and echoes, UDP datagrams.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::engine::frame::{EtherType, IPV4_BYTES, Ipv4};
use crate::engine::transmit::Transmit;

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
/// ICMP's protocol number.
pub const ICMP: u8 = 1;

const TTL_HOPS: u8 = 64;
const TCP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
const ICMP_BYTES: usize = 8;
/// How much of the offending packet an ICMP error quotes beyond its header (RFC 792), bytes.
const QUOTE_BYTES: usize = 8;

/// Why a destination could not be reached, as ICMP type 3 says it (RFC 792, RFC 1122 §3.2.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// Code 0.
    Network,
    /// Code 1.
    Host,
    /// Code 3.
    Port,
    /// Code 13, communication administratively prohibited (RFC 1812 §5.2.7.1).
    Prohibited,
}

impl Unreachable {
    fn code(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Host => 1,
            Self::Port => 3,
            Self::Prohibited => 13,
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

    /// Reads a segment's header; `None` when it is cut short.
    pub fn parse(segment: &[u8]) -> Option<Self> {
        let header = segment.first_chunk::<TCP_BYTES>()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        let payload = segment.len().checked_sub(header_bytes.max(TCP_BYTES))?;
        if header_bytes < TCP_BYTES {
            return None;
        }
        let flags = header[13];
        let marks = u32::from(flags & Self::SYN != 0) + u32::from(flags & Self::FIN != 0);
        Some(Self {
            source: u16::from_be_bytes([header[0], header[1]]),
            destination: u16::from_be_bytes([header[2], header[3]]),
            sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
            acknowledgement: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
            flags,
            sequence_bytes: u32::try_from(payload).unwrap_or(u32::MAX).saturating_add(marks),
        })
    }

    /// Whether it opens a connection.
    pub fn is_syn(&self) -> bool {
        self.flags & (Self::SYN | Self::ACK | Self::RST) == Self::SYN
    }

    /// Whether it resets one.
    pub fn is_reset(&self) -> bool {
        self.flags & Self::RST != 0
    }
}

/// Queues the RST that answers a segment (RFC 9293 §3.10.7.1); nothing for a RST.
pub fn reset(out: &mut Transmit, to: Ipv4Addr, from: Ipv4Addr, header: &TcpHeader) {
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
    let from = SocketAddrV4::new(from, header.destination);
    let to = SocketAddrV4::new(to, header.source);
    bare_segment(out, from, to, sequence, acknowledgement, flags);
}

/// Queues a RST of a connection that is cut, from a peer that does not know of it.
pub fn abort(
    out: &mut Transmit,
    from: SocketAddrV4,
    to: SocketAddrV4,
    sequence: u32,
    acknowledgement: Option<u32>,
) {
    let flags = acknowledgement.map_or(TcpHeader::RST, |_| TcpHeader::RST | TcpHeader::ACK);
    bare_segment(out, from, to, sequence, acknowledgement.unwrap_or(0), flags);
}

/// A segment of nothing but its header.
fn bare_segment(
    out: &mut Transmit,
    from: SocketAddrV4,
    to: SocketAddrV4,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
) {
    ipv4(out, *from.ip(), *to.ip(), TCP, TCP_BYTES, |segment| {
        segment.fill(0);
        segment[..2].copy_from_slice(&from.port().to_be_bytes());
        segment[2..4].copy_from_slice(&to.port().to_be_bytes());
        segment[4..8].copy_from_slice(&sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
        segment[12] = 5 << 4;
        segment[13] = flags;
        let sum = pseudo_header_sum(*from.ip(), *to.ip(), TCP, TCP_BYTES) + word_sum(segment);
        segment[16..18].copy_from_slice(&fold(sum).to_be_bytes());
    });
}

/// Queues an ICMP destination-unreachable that quotes a guest's packet.
pub fn unreachable(out: &mut Transmit, gateway: Ipv4Addr, cause: &Ipv4<'_>, why: Unreachable) {
    let quoted = cause.packet.len().min(cause.header_bytes + QUOTE_BYTES);
    ipv4(out, gateway, cause.source, ICMP, ICMP_BYTES + quoted, |message| {
        message[..ICMP_BYTES].fill(0);
        message[0] = 3;
        message[1] = why.code();
        message[ICMP_BYTES..].copy_from_slice(&cause.packet[..quoted]);
        let sum = fold(word_sum(message));
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    });
}

/// The same for a packet of which only the start was kept; nothing when that is no IPv4 header.
pub fn unreachable_quote(out: &mut Transmit, gateway: Ipv4Addr, quote: &[u8], why: Unreachable) {
    let Some(header) = quote.first_chunk::<IPV4_BYTES>() else {
        return;
    };
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
    let destination = Ipv4Addr::new(header[16], header[17], header[18], header[19]);
    let cause = Ipv4 {
        packet: quote,
        header_bytes: header_bytes.min(quote.len()),
        source,
        destination,
        protocol: header[9],
        identification: 0,
        fragment_offset: 0,
        more_fragments: false,
    };
    unreachable(out, gateway, &cause, why);
}

/// The same for a datagram that was passed on whole: its header is made again for the quote.
pub fn unreachable_for_udp(
    out: &mut Transmit,
    gateway: Ipv4Addr,
    guest: SocketAddrV4,
    peer: SocketAddrV4,
    why: Unreachable,
) {
    let mut quote = [0; IPV4_BYTES + UDP_BYTES];
    quote[0] = 0x45;
    quote[3] = (IPV4_BYTES + UDP_BYTES) as u8;
    quote[8] = TTL_HOPS;
    quote[9] = UDP;
    quote[12..16].copy_from_slice(&guest.ip().octets());
    quote[16..20].copy_from_slice(&peer.ip().octets());
    let sum = fold(word_sum(&quote[..IPV4_BYTES]));
    quote[10..12].copy_from_slice(&sum.to_be_bytes());
    quote[20..22].copy_from_slice(&guest.port().to_be_bytes());
    quote[22..24].copy_from_slice(&peer.port().to_be_bytes());
    quote[25] = UDP_BYTES as u8;
    unreachable_quote(out, gateway, &quote, why);
}

/// Queues an ICMP message from the host's side with its checksum made anew.
pub fn icmp(out: &mut Transmit, from: Ipv4Addr, to: Ipv4Addr, message: &[u8], mtu_bytes: usize) -> bool {
    if message.len() < ICMP_BYTES {
        return true;
    }
    fragmented(out, from, to, ICMP, message.len(), mtu_bytes, |packet| {
        packet.copy_from_slice(message);
        packet[2..4].fill(0);
        let sum = fold(word_sum(packet));
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    })
}

/// Queues a UDP datagram. False when there was no room.
pub fn udp(
    out: &mut Transmit,
    from: SocketAddrV4,
    to: SocketAddrV4,
    payload: &[u8],
    mtu_bytes: usize,
) -> bool {
    let length = UDP_BYTES + payload.len();
    let Ok(wire_length) = u16::try_from(length) else {
        return true;
    };
    fragmented(out, *from.ip(), *to.ip(), UDP, length, mtu_bytes, |datagram| {
        datagram[..2].copy_from_slice(&from.port().to_be_bytes());
        datagram[2..4].copy_from_slice(&to.port().to_be_bytes());
        datagram[4..6].copy_from_slice(&wire_length.to_be_bytes());
        datagram[6..8].fill(0);
        datagram[8..].copy_from_slice(payload);
        let sum = fold(pseudo_header_sum(*from.ip(), *to.ip(), UDP, length) + word_sum(datagram));
        // Zero means "no checksum" (RFC 768).
        let sum = if sum == 0 { 0xffff } else { sum };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    })
}

/// One packet where it fits the MTU, else fragments (RFC 791 §3.2).
fn fragmented(
    out: &mut Transmit,
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload_bytes: usize,
    mtu_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    if IPV4_BYTES + payload_bytes <= mtu_bytes {
        return ipv4(out, from, to, protocol, payload_bytes, fill);
    }
    let mut payload = vec![0; payload_bytes];
    fill(&mut payload);
    let step = (mtu_bytes - IPV4_BYTES) / 8 * 8;
    let fragments = payload_bytes.div_ceil(step);
    if !out.has_room(fragments * (mtu_bytes + 32)) {
        return false;
    }
    let identification = out.next_identification();
    for (index, part) in payload.chunks(step).enumerate() {
        let more = if index + 1 < fragments { 0x2000 } else { 0 };
        let flags = u16::try_from(index * step / 8).unwrap_or(0) | more;
        packet(
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
    true
}

fn ipv4(
    out: &mut Transmit,
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload_bytes: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    const DO_NOT_FRAGMENT: u16 = 0x4000;
    packet(out, from, to, protocol, payload_bytes, 0, DO_NOT_FRAGMENT, fill)
}

#[expect(clippy::too_many_arguments, reason = "the fields of a header")]
fn packet(
    out: &mut Transmit,
    from: Ipv4Addr,
    to: Ipv4Addr,
    protocol: u8,
    payload_bytes: usize,
    identification: u16,
    flags_and_offset: u16,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    let Ok(total) = u16::try_from(IPV4_BYTES + payload_bytes) else {
        return true;
    };
    out.packet(EtherType::Ipv4, total.into(), |packet| {
        let (header, payload) = packet.split_at_mut(IPV4_BYTES);
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
        fill(payload);
    })
    .is_some()
}

fn pseudo_header_sum(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: usize) -> u64 {
    word_sum(&from.octets()) + word_sum(&to.octets()) + u64::from(protocol) + length as u64
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
    use smoltcp::wire::{Icmpv4Packet, Ipv4Packet, TcpPacket, UdpPacket};

    use super::*;
    use crate::mac::Mac;

    const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
    const PEER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

    fn queue() -> Transmit {
        Transmit::new(Mac([2; 6]))
    }

    #[test]
    fn a_syn_is_refused_with_the_right_acknowledgement() {
        let mut out = queue();
        let syn = TcpHeader {
            source: 40000,
            destination: 80,
            sequence: u32::MAX,
            acknowledgement: 0,
            flags: TcpHeader::SYN,
            sequence_bytes: 1,
        };
        reset(&mut out, GUEST, PEER, &syn);
        let frame = out.first_frame().unwrap();
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert!(ip.verify_checksum());
        let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
        assert!(tcp.verify_checksum(&PEER.into(), &GUEST.into()));
        assert!(tcp.rst() && tcp.ack());
        assert_eq!(
            (tcp.src_port(), tcp.dst_port(), tcp.ack_number().0),
            (80, 40000, 0)
        );
    }

    #[test]
    fn large_datagrams_leave_in_fragments_that_add_up() {
        let mut out = queue();
        let payload: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        let from = SocketAddrV4::new(PEER, 53);
        assert!(udp(
            &mut out,
            from,
            SocketAddrV4::new(GUEST, 5353),
            &payload,
            1500
        ));
        let mut whole = vec![0; 5008];
        let mut seen = 0;
        while let Some(frame) = out.first_frame() {
            let length = frame.len();
            let ip = Ipv4::parse(&frame[14..]).unwrap();
            assert!(ip.packet.len() <= 1500 && Ipv4Packet::new_checked(ip.packet).unwrap().verify_checksum());
            whole[ip.fragment_offset..ip.fragment_offset + ip.payload().len()].copy_from_slice(ip.payload());
            seen += ip.payload().len();
            out.consume(4 + length);
        }
        assert_eq!(seen, 5008);
        let datagram = UdpPacket::new_checked(&whole).unwrap();
        assert!(datagram.verify_checksum(&PEER.into(), &GUEST.into()));
        assert_eq!(datagram.payload(), payload);
    }

    #[test]
    fn unreachable_quotes_the_header_and_eight_bytes() {
        let mut out = queue();
        udp(
            &mut out,
            SocketAddrV4::new(GUEST, 9),
            SocketAddrV4::new(PEER, 9),
            b"hello world",
            1500,
        );
        let frame = out.first_frame().unwrap().to_vec();
        out.clear();
        unreachable(
            &mut out,
            PEER,
            &Ipv4::parse(&frame[14..]).unwrap(),
            Unreachable::Prohibited,
        );
        let answer = out.first_frame().unwrap();
        let ip = Ipv4Packet::new_checked(&answer[14..]).unwrap();
        let message = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(message.verify_checksum());
        assert_eq!((u8::from(message.msg_type()), message.msg_code()), (3, 13));
        assert_eq!(ip.payload().len(), 8 + 28);
    }
}
