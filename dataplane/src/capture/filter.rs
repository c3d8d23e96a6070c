//! Which frames a filter wants: a frame's headers, read as far as they can be, held against its terms.
//!
//! A frame that is cut short or malformed has what could be read of it and nothing else; a term about the rest does
//! not hold (and holds behind `not`).

use std::net::IpAddr;

use smoltcp::wire::{
    ArpOperation, ArpPacket, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6ExtHeader,
    Ipv6Packet,
};
use vnet_proto::model::{CaptureFilter, CaptureWord};

use crate::engine::ip::EXTENSIONS_MAX;

/// What could be read of a frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Headers {
    network: Option<Network>,
    /// Sender and receiver, or of ARP what is told and what is asked for.
    addresses: Option<(IpAddr, IpAddr)>,
    protocol: Option<IpProtocol>,
    /// From and to; only of TCP and UDP, and only of a packet that begins one.
    ports: Option<(u16, u16)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Arp,
    Ipv4,
    Ipv6,
}

/// Whether a filter wants a frame.
pub(super) fn wants(filter: &CaptureFilter, frame: &[u8]) -> bool {
    if filter.is_everything() {
        return true;
    }
    let headers = Headers::read(frame);
    filter
        .terms()
        .iter()
        .all(|term| headers.are(&term.what) != term.negated)
}

impl Headers {
    fn read(frame: &[u8]) -> Self {
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return Self::default();
        };
        match frame.ethertype() {
            EthernetProtocol::Arp => Self::of_arp(frame.payload()),
            EthernetProtocol::Ipv4 => Self::of_ipv4(frame.payload()),
            EthernetProtocol::Ipv6 => Self::of_ipv6(frame.payload()),
            EthernetProtocol::Unknown(_) => Self::default(),
        }
    }

    fn of_arp(bytes: &[u8]) -> Self {
        let mut headers = Self {
            network: Some(Network::Arp),
            ..Self::default()
        };
        if let Ok(packet) = ArpPacket::new_checked(bytes)
            && matches!(packet.operation(), ArpOperation::Request | ArpOperation::Reply)
            && let (Ok(source), Ok(target)) = (
                <[u8; 4]>::try_from(packet.source_protocol_addr()),
                <[u8; 4]>::try_from(packet.target_protocol_addr()),
            )
        {
            headers.addresses = Some((source.into(), target.into()));
        }
        headers
    }

    fn of_ipv4(bytes: &[u8]) -> Self {
        let mut headers = Self {
            network: Some(Network::Ipv4),
            ..Self::default()
        };
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else {
            return headers;
        };
        headers.addresses = Some((packet.src_addr().into(), packet.dst_addr().into()));
        headers.protocol = Some(packet.next_header());
        if packet.frag_offset() == 0 {
            headers.read_ports(packet.payload());
        }
        headers
    }

    fn of_ipv6(bytes: &[u8]) -> Self {
        let mut headers = Self {
            network: Some(Network::Ipv6),
            ..Self::default()
        };
        let Ok(packet) = Ipv6Packet::new_checked(bytes) else {
            return headers;
        };
        headers.addresses = Some((packet.src_addr().into(), packet.dst_addr().into()));
        let (mut next, mut rest) = (packet.next_header(), packet.payload());
        let mut is_first = true;
        for _ in 0..EXTENSIONS_MAX {
            let length = match next {
                IpProtocol::HopByHop | IpProtocol::Ipv6Route | IpProtocol::Ipv6Opts => {
                    let Ok(extension) = Ipv6ExtHeader::new_checked(rest) else {
                        break;
                    };
                    (usize::from(extension.header_len()) + 1) * 8
                }
                IpProtocol::Ipv6Frag => {
                    let Some(offset) = rest.get(2..4) else { break };
                    is_first &= u16::from_be_bytes([offset[0], offset[1]]) >> 3 == 0;
                    8
                }
                _ => break,
            };
            let (Some(following), Some(behind)) = (rest.first(), rest.get(length..)) else {
                break;
            };
            (next, rest) = (IpProtocol::from(*following), behind);
        }
        headers.protocol = Some(next);
        if is_first {
            headers.read_ports(rest);
        }
        headers
    }

    fn read_ports(&mut self, bytes: &[u8]) {
        if let Some(IpProtocol::Tcp | IpProtocol::Udp) = self.protocol
            && let Some([a, b, c, d]) = bytes.first_chunk()
        {
            self.ports = Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])));
        }
    }

    fn are(&self, what: &CaptureWord) -> bool {
        match what {
            CaptureWord::Tcp => self.protocol == Some(IpProtocol::Tcp),
            CaptureWord::Udp => self.protocol == Some(IpProtocol::Udp),
            CaptureWord::Icmp => matches!(self.protocol, Some(IpProtocol::Icmp | IpProtocol::Icmpv6)),
            CaptureWord::Arp => self.network == Some(Network::Arp),
            CaptureWord::Ip => self.network == Some(Network::Ipv4),
            CaptureWord::Ip6 => self.network == Some(Network::Ipv6),
            CaptureWord::Port(range) => self
                .ports
                .is_some_and(|(from, to)| range.contains(&from) || range.contains(&to)),
            CaptureWord::Host(network) => self
                .addresses
                .is_some_and(|(from, to)| network.contains(&from) || network.contains(&to)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
        [&[2; 12][..], &kind.to_be_bytes(), payload].concat()
    }

    fn ipv4(protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let [high, low] = fragment.to_be_bytes();
        let header = [
            0x45, 0, length[0], length[1], 0, 1, high, low, 64, protocol, 0, 0, 192, 168, 127, 2, 203, 0,
            113, 10,
        ];
        ethernet(0x0800, &[&header, payload].concat())
    }

    fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
        let mut header = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
        header.extend("fd00::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
        header.extend("2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets());
        ethernet(0x86dd, &[&header[..], payload].concat())
    }

    /// From 4000 to 80.
    const PORTS: [u8; 8] = [0x0f, 0xa0, 0, 80, 0, 8, 0, 0];

    #[test]
    fn each_term_holds_for_what_it_says_and_for_nothing_else() {
        let arp = [
            &[0, 1, 8, 0, 6, 4, 0, 1][..],
            &[2; 6],
            &[192, 168, 127, 2],
            &[0; 6],
            &[192, 168, 127, 1],
        ]
        .concat();
        let behind_extensions = [&[44, 0, 1, 4, 0, 0, 0, 0][..], &[6, 0, 0, 0, 0, 0, 0, 1], &PORTS].concat();
        let frames = [
            ("tcp", ipv4(6, 0, &PORTS)),
            ("later", ipv4(6, 185, &PORTS)),
            ("udp", ipv4(17, 0x2000, &PORTS)),
            ("icmp", ipv4(1, 0, &[8, 0, 0, 0, 0, 80, 0, 80])),
            ("arp", ethernet(0x0806, &arp)),
            ("tcp6", ipv6(0, &behind_extensions)),
            ("icmp6", ipv6(58, &[128, 0, 0, 0, 0, 0, 0, 0])),
            ("other", ethernet(0x88b5, b"whatever")),
        ];
        for (filter, expected) in [
            ("", "tcp later udp icmp arp tcp6 icmp6 other"),
            ("tcp", "tcp later tcp6"),
            ("udp", "udp"),
            ("icmp", "icmp icmp6"),
            ("arp", "arp"),
            ("ip", "tcp later udp icmp"),
            ("ip6", "tcp6 icmp6"),
            ("port 80", "tcp udp tcp6"),
            ("port 3999-4000", "tcp udp tcp6"),
            ("port 81-3999", ""),
            ("tcp port 80", "tcp tcp6"),
            ("host 203.0.113.0/24", "tcp later udp icmp"),
            ("host 192.168.127.1", "arp"),
            ("host 192.168.127.2 not arp", "tcp later udp icmp"),
            ("host 2001:db8::1", "tcp6 icmp6"),
            ("not ip not ip6", "arp other"),
            ("tcp udp", ""),
        ] {
            let parsed: CaptureFilter = filter.parse().unwrap();
            let found: Vec<&str> = frames
                .iter()
                .filter(|(_, frame)| wants(&parsed, frame))
                .map(|(name, _)| *name)
                .collect();
            assert_eq!(found.join(" "), expected, "{filter}");
        }
    }

    #[test]
    fn no_bytes_are_too_few_or_too_wrong() {
        let filter: CaptureFilter = "tcp port 80 host 10.0.0.0/8 arp ip ip6 icmp not udp"
            .parse()
            .unwrap();
        let whole = [
            ipv4(6, 0, &PORTS),
            ipv6(0, &[0; 64]),
            ipv6(44, &[43; 40]),
            ethernet(0x0806, &[0; 28]),
        ];
        for frame in whole {
            for length in 0..=frame.len() {
                wants(&filter, &frame[..length]);
                Headers::read(&frame[..length]);
            }
            for at in 0..frame.len() {
                for value in [0, 0x0f, 0x7f, 0xff] {
                    let mut broken = frame.clone();
                    broken[at] = value;
                    Headers::read(&broken);
                }
            }
        }
    }
}
