//! Parses an IP packet once, IPv4 (RFC 791) or IPv6 (RFC 8200), into one [`Ip`] for both: whoever decides
//! about a flow does not ask which it is.
//!
//! Lengths are checked, always; checksums are not (see [`super::frame`]). Of IPv6's extension headers those
//! that change nothing here are passed over, a bounded number of them; a routing header that still has a
//! way to go, an option that says "discard me if you do not know me" (jumbograms and home addresses among
//! them) and anything unknown end a packet. What a guest says of a packet's way counts for nothing: the
//! host's sockets go to the destination.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::engine::frame::{DropReason, EtherType};

/// An IPv4 header without options, bytes.
pub const IPV4_BYTES: usize = 20;
/// An IPv6 header without extensions, bytes.
pub const IPV6_BYTES: usize = 40;
/// The least MTU of a link that carries IPv6 (RFC 8200 §5), bytes.
pub const IPV6_MTU_BYTES_MIN: usize = 1280;
/// Extension headers of one packet.
pub const EXTENSIONS_MAX: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
/// How much of a packet beyond its headers an ICMP error quotes at least (RFC 792), bytes.
const QUOTE_BYTES: usize = 8;
/// How much an ICMPv6 error quotes at most: it must not exceed the least MTU (RFC 4443 §2.4).
const QUOTE_BYTES_MAX: usize = IPV6_MTU_BYTES_MIN - IPV6_BYTES - 8;

/// A packet.
#[derive(Debug, Clone, Copy)]
pub struct Ip<'a> {
    /// The packet, cut to the length that it says.
    pub packet: &'a [u8],
    /// Length of all its headers, bytes.
    pub header_bytes: u16,
    /// Source; of the same family as the destination.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// What it carries: a protocol number.
    pub protocol: u8,
    /// Hops it may still take.
    pub hop_limit: u8,
    /// What part of a larger packet it is, if it is one.
    pub part: Option<Part>,
}

/// What part of a larger packet a fragment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which packet.
    pub identification: u32,
    /// Where in its payload, bytes.
    pub offset: u16,
    /// Whether more of it follows.
    pub more: bool,
    /// Length of the headers that the whole packet begins with, bytes.
    pub head_bytes: u16,
    /// Where in them it says what follows them (IPv6, whose fragments say it in a header of their own).
    pub next_header_at: u16,
}

impl<'a> Ip<'a> {
    /// Reads the headers of a packet.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] when lengths or version are wrong, [`DropReason::IpProtocol`] for an
    /// extension that is not carried.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        match bytes.first().map(|b| b >> 4) {
            Some(4) => Self::parse_ipv4(bytes),
            Some(6) => Self::parse_ipv6(bytes),
            _ => Err(DropReason::Malformed),
        }
    }

    /// Reads the headers of a packet of which only the start is there, as in an ICMP error. `None` where that
    /// is no packet, or too little.
    pub fn parse_quote(bytes: &'a [u8]) -> Option<Self> {
        let read = match bytes.first()? >> 4 {
            4 => Self::read_ipv4(bytes, Length::AtMost),
            _ => Self::read_ipv6(bytes, Length::AtMost),
        };
        read.ok()
    }

    /// Reads the header of an IPv4 packet.
    ///
    /// # Errors
    /// [`DropReason::Malformed`].
    #[inline]
    pub fn parse_ipv4(bytes: &'a [u8]) -> Result<Self, DropReason> {
        Self::read_ipv4(bytes, Length::Exact)
    }

    #[inline]
    fn read_ipv4(bytes: &'a [u8], length: Length) -> Result<Self, DropReason> {
        let header = bytes.first_chunk::<IPV4_BYTES>().ok_or(DropReason::Malformed)?;
        let header_bytes = u16::from(header[0] & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        // A super-frame of an offloading hypervisor may leave the length zero.
        let total = length.of(if total == 0 { bytes.len() } else { total }, bytes);
        let has_length = (usize::from(header_bytes)..=usize::from(u16::MAX)).contains(&total);
        if header[0] >> 4 != 4 || usize::from(header_bytes) < IPV4_BYTES || !has_length {
            return Err(DropReason::Malformed);
        }
        let packet = bytes.get(..total).ok_or(DropReason::Malformed)?;
        let flags = u16::from_be_bytes([header[6], header[7]]);
        let (offset, more) = ((flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let part = (more || offset != 0).then(|| Part {
            identification: u16::from_be_bytes([header[4], header[5]]).into(),
            offset,
            more,
            head_bytes: header_bytes,
            next_header_at: 9,
        });
        Ok(Self {
            packet,
            header_bytes,
            source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
            destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
            protocol: header[9],
            hop_limit: header[8],
            part,
        })
    }

    /// Reads the headers of an IPv6 packet, as far as they go: those behind a fragment header are the whole
    /// packet's. A fragment that is whole by itself (RFC 6946) is no fragment.
    ///
    /// # Errors
    /// [`DropReason::Malformed`], [`DropReason::IpProtocol`].
    pub fn parse_ipv6(bytes: &'a [u8]) -> Result<Self, DropReason> {
        Self::read_ipv6(bytes, Length::Exact)
    }

    fn read_ipv6(bytes: &'a [u8], length: Length) -> Result<Self, DropReason> {
        let header = bytes.first_chunk::<IPV6_BYTES>().ok_or(DropReason::Malformed)?;
        // A jumbogram (RFC 2675) says zero here: it ends with its headers, and so has none for its payload.
        let total = IPV6_BYTES + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let packet = bytes
            .get(..length.of(total, bytes))
            .ok_or(DropReason::Malformed)?;
        if header[0] >> 4 != 6 {
            return Err(DropReason::Malformed);
        }
        let (source, destination) = (address(&header[8..24]), address(&header[24..40]));
        let mut chain = Chain {
            next: header[6],
            next_at: 6,
            at: IPV6_BYTES,
        };
        let mut part = None;
        let (mut seen, mut atomic) = (0, false);
        while part.is_none() && is_extension(chain.next) {
            seen += 1;
            if seen > EXTENSIONS_MAX {
                return Err(DropReason::IpProtocol);
            }
            if chain.next == FRAGMENT {
                if std::mem::replace(&mut atomic, true) {
                    return Err(DropReason::Malformed);
                }
                part = chain.pass_fragment(packet)?;
            } else {
                chain.pass(packet)?;
            }
        }
        Ok(Self {
            packet,
            header_bytes: short(chain.at)?,
            source: source.into(),
            destination: destination.into(),
            protocol: chain.next,
            hop_limit: header[7],
            part,
        })
    }

    /// What the packet carries.
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        &self.packet[usize::from(self.header_bytes)..]
    }

    /// Whether nobody may take it apart. Of IPv6 only what came in fragments ever need be.
    pub fn do_not_fragment(&self) -> bool {
        self.source.is_ipv4() && self.packet[6] & 0x40 != 0
    }

    /// The EtherType of the frame that carries it.
    pub fn ether_type(&self) -> EtherType {
        match self.source {
            IpAddr::V4(_) => EtherType::Ipv4,
            IpAddr::V6(_) => EtherType::Ipv6,
        }
    }

    /// Whether it is a part of a larger packet.
    pub fn is_fragment(&self) -> bool {
        self.part.is_some()
    }

    /// What an ICMP error about it quotes.
    pub fn quote(&self) -> &'a [u8] {
        let most = match self.destination {
            IpAddr::V4(_) => usize::from(self.header_bytes) + QUOTE_BYTES,
            IpAddr::V6(_) => QUOTE_BYTES_MAX,
        };
        &self.packet[..self.packet.len().min(most)]
    }

    /// What is kept of it for an error that may follow.
    pub fn short_quote(&self) -> &'a [u8] {
        let most = (usize::from(self.header_bytes) + QUOTE_BYTES).min(QUOTE_BYTES_MAX);
        &self.packet[..self.packet.len().min(most)]
    }

    /// The packet without its extension headers, if it has any: for a reader that knows none.
    pub fn without_extensions(&self) -> Option<Vec<u8>> {
        if self.destination.is_ipv4() || usize::from(self.header_bytes) == IPV6_BYTES {
            return None;
        }
        let payload = self.payload();
        let mut packet = [&self.packet[..IPV6_BYTES], payload].concat();
        let length = u16::try_from(payload.len()).unwrap_or(0);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet[6] = self.protocol;
        Some(packet)
    }
}

/// What the length that a packet says means for the bytes that are there.
#[derive(Clone, Copy)]
enum Length {
    /// So many are there.
    Exact,
    /// There may be fewer.
    AtMost,
}

impl Length {
    fn of(self, said: usize, bytes: &[u8]) -> usize {
        match self {
            Self::Exact => said,
            Self::AtMost => said.min(bytes.len()),
        }
    }
}

/// Where in a chain of headers a reader is.
struct Chain {
    /// What stands there.
    next: u8,
    /// Where that was said.
    next_at: usize,
    at: usize,
}

impl Chain {
    /// Passes over a header that has no effect here.
    fn pass(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        let [next, length] = *packet
            .get(self.at..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(DropReason::Malformed)?;
        let end = self.at + 8 + usize::from(length) * 8;
        let content = packet.get(self.at + 2..end).ok_or(DropReason::Malformed)?;
        match self.next {
            // The first header or none (RFC 8200 §4.1).
            HOP_BY_HOP if self.at != IPV6_BYTES => return Err(DropReason::Malformed),
            HOP_BY_HOP | DESTINATION_OPTIONS => check_options(content)?,
            // Type 0 (RFC 5095), or one that would have the packet go on from its destination.
            _ if content[0] == 0 || content[1] != 0 => return Err(DropReason::IpProtocol),
            _ => {}
        }
        *self = Self {
            next,
            next_at: self.at,
            at: end,
        };
        Ok(())
    }

    /// Passes over a fragment header; what part of a packet follows it.
    fn pass_fragment(&mut self, packet: &[u8]) -> Result<Option<Part>, DropReason> {
        let [next, _, high, low, identification @ ..] = *packet
            .get(self.at..)
            .and_then(|rest| rest.first_chunk::<8>())
            .ok_or(DropReason::Malformed)?;
        let offset = u16::from_be_bytes([high, low]);
        let part = Part {
            identification: u32::from_be_bytes(identification),
            offset: offset & !7,
            more: offset & 1 != 0,
            head_bytes: short(self.at)?,
            next_header_at: short(self.next_at)?,
        };
        *self = Self {
            next,
            next_at: self.at,
            at: self.at + 8,
        };
        Ok((part.more || part.offset != 0).then_some(part))
    }
}

/// A place among headers. A chain of so many cannot be longer than this holds.
fn short(at: usize) -> Result<u16, DropReason> {
    u16::try_from(at).map_err(|_| DropReason::Malformed)
}

fn is_extension(header: u8) -> bool {
    matches!(header, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
}

/// Options are passed over, unless one says that who does not know it must discard the packet (RFC 8200
/// §4.2: one of its type's two highest bits is set).
fn check_options(mut rest: &[u8]) -> Result<(), DropReason> {
    while let Some((&kind, after)) = rest.split_first() {
        rest = after;
        if kind == 0 {
            continue;
        }
        let (&length, after) = rest.split_first().ok_or(DropReason::Malformed)?;
        rest = after.get(usize::from(length)..).ok_or(DropReason::Malformed)?;
        if kind >> 6 != 0 {
            return Err(DropReason::IpProtocol);
        }
    }
    Ok(())
}

fn address(bytes: &[u8]) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(bytes);
    octets.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv6 packet to 2001:db8::9 with these headers.
    fn packet(headers: Headers<'_>, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        for (index, (_, content)) in headers.iter().enumerate() {
            let next = headers.get(index + 1).map_or(protocol, |(kind, _)| *kind);
            body.extend_from_slice(&[next, ((content.len() + 2) / 8 - 1) as u8]);
            body.extend_from_slice(content);
        }
        body.extend_from_slice(payload);
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend_from_slice(&(body.len() as u16).to_be_bytes());
        packet.extend_from_slice(&[headers.first().map_or(protocol, |(kind, _)| *kind), 64]);
        packet.extend_from_slice(&"fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(&"2001:db8::9".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend_from_slice(&body);
        packet
    }

    /// Headers by kind, with their content but for its first two bytes.
    type Headers<'a> = &'a [(u8, &'a [u8])];

    const PADDING: &[u8] = &[1, 4, 0, 0, 0, 0];

    #[test]
    fn runts_and_lying_lengths_are_malformed() {
        let mut ipv4 = [0u8; 20];
        ipv4[0] = 0x45;
        for (length, first, right) in [
            (21, 0x45, false),
            (19, 0x45, false),
            (20, 0x45, true),
            (20, 0x46, false),
        ] {
            (ipv4[3], ipv4[0]) = (length, first);
            assert_eq!(Ip::parse(&ipv4).is_ok(), right, "{length} {first:x}");
        }
        let ipv6 = packet(&[], 17, b"payload.");
        assert_eq!(Ip::parse(&ipv6).unwrap().payload(), b"payload.");
        assert_eq!(
            Ip::parse(&ipv6[..ipv6.len() - 1]).unwrap_err(),
            DropReason::Malformed
        );
        assert_eq!(Ip::parse(&ipv6[..39]).unwrap_err(), DropReason::Malformed);
        assert_eq!(Ip::parse(&[0x50; 60]).unwrap_err(), DropReason::Malformed);
        assert_eq!(Ip::parse(&[]).unwrap_err(), DropReason::Malformed);
    }

    #[test]
    fn headers_without_effect_are_passed_over() {
        let chain: Headers<'_> = &[
            (HOP_BY_HOP, &[5, 2, 0, 0, 1, 0]),
            (DESTINATION_OPTIONS, PADDING),
            (ROUTING, &[2, 0, 0, 0, 0, 0]),
            (DESTINATION_OPTIONS, PADDING),
        ];
        let bytes = packet(chain, 17, b"payload.");
        let ip = Ip::parse(&bytes).unwrap();
        assert_eq!((ip.protocol, ip.header_bytes), (17, 40 + 32));
        assert_eq!(ip.payload(), b"payload.");
        assert_eq!(ip.destination.to_string(), "2001:db8::9");
        let plain = ip.without_extensions().unwrap();
        assert_eq!(plain, packet(&[], 17, b"payload."));
        assert!(Ip::parse(&plain).unwrap().without_extensions().is_none());
    }

    #[test]
    fn headers_with_an_effect_end_a_packet() {
        let refused: &[(&str, Headers<'_>)] = &[
            ("routing of type 0", &[(ROUTING, &[0, 0, 0, 0, 0, 0])]),
            ("a way still to go", &[(ROUTING, &[4, 1, 0, 0, 0, 0])]),
            ("a jumbogram", &[(HOP_BY_HOP, &[0xc2, 4, 0, 1, 0, 0])]),
            (
                "an option to discard",
                &[(DESTINATION_OPTIONS, &[0x41, 4, 0, 0, 0, 0])],
            ),
        ];
        for (what, headers) in refused {
            assert_eq!(
                Ip::parse(&packet(headers, 17, b"x")).unwrap_err(),
                DropReason::IpProtocol,
                "{what}"
            );
        }
        let late: Headers<'_> = &[(DESTINATION_OPTIONS, PADDING), (HOP_BY_HOP, PADDING)];
        assert_eq!(
            Ip::parse(&packet(late, 17, b"x")).unwrap_err(),
            DropReason::Malformed
        );
        let cut: Headers<'_> = &[(DESTINATION_OPTIONS, &[1, 5, 0, 0, 0, 0])];
        assert_eq!(
            Ip::parse(&packet(cut, 17, b"x")).unwrap_err(),
            DropReason::Malformed
        );
        let mut short = packet(&[(DESTINATION_OPTIONS, PADDING)], 17, &[]);
        short[41] = 1;
        assert_eq!(Ip::parse(&short).unwrap_err(), DropReason::Malformed);
    }

    #[test]
    fn a_chain_of_headers_is_bounded() {
        let chain = |length| vec![(DESTINATION_OPTIONS, PADDING); length];
        assert!(Ip::parse(&packet(&chain(EXTENSIONS_MAX), 17, b"x")).is_ok());
        assert_eq!(
            Ip::parse(&packet(&chain(EXTENSIONS_MAX + 1), 17, b"x")).unwrap_err(),
            DropReason::IpProtocol
        );
    }

    #[test]
    fn a_fragment_says_which_part_it_is_and_one_that_is_whole_is_none() {
        let headers: Headers<'_> = &[(DESTINATION_OPTIONS, PADDING), (FRAGMENT, &[0, 17, 0, 0, 0, 7])];
        let bytes = packet(headers, 17, b"payload.");
        let ip = Ip::parse(&bytes).unwrap();
        let part = Part {
            identification: 7,
            offset: 16,
            more: true,
            head_bytes: 48,
            next_header_at: 40,
        };
        assert_eq!((ip.part, ip.protocol), (Some(part), 17));
        assert_eq!(ip.payload(), b"payload.");

        let atomic: Headers<'_> = &[(FRAGMENT, &[0, 0, 0, 0, 0, 7])];
        let bytes = packet(atomic, 17, b"payload.");
        let ip = Ip::parse(&bytes).unwrap();
        assert!(!ip.is_fragment());
        assert_eq!((ip.protocol, ip.payload()), (17, b"payload.".as_slice()));
        let twice = [atomic, atomic].concat();
        assert_eq!(
            Ip::parse(&packet(&twice, 17, b"x")).unwrap_err(),
            DropReason::Malformed
        );
    }
}
