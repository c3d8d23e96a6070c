//! Between which two ends a packet passes, read off the packet: the same for the guest that sends it and
//! for the one that it comes to.

use std::net::{IpAddr, SocketAddr};

use vnet_proto::model::{FlowKey, Protocol};

use crate::engine::ip::Ip;
use crate::engine::reply::{ICMP, ICMPV6, TCP, UDP};

const ICMP_BYTES: usize = 8;
/// Types of ICMP (RFC 792).
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;
/// Types of ICMPv6 (RFC 4443): errors are unreachable, packet too big, time exceeded, parameter problem.
const ERRORS_V6: std::ops::RangeInclusive<u8> = 1..=4;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// The flow that a packet belongs to, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct About {
    /// The flow's key.
    pub(super) key: FlowKey,
    /// The packet is an ICMP error about one of the flow's.
    pub(super) is_error: bool,
}

impl About {
    /// As the guest that sends the packet keeps the flow.
    pub(super) fn sent(ip: &Ip<'_>) -> Option<Self> {
        let own = |ends: Ends| Self::new(ends.sent(), false);
        let quoted = || Ends::quoted_by(ip).map(|ends| Self::new(ends.received(), true));
        Ends::of(ip).map(own).or_else(quoted)
    }

    /// As the guest that the packet comes to keeps it.
    pub(super) fn received(ip: &Ip<'_>) -> Option<Self> {
        let own = |ends: Ends| Self::new(ends.received(), false);
        let quoted = || Ends::quoted_by(ip).map(|ends| Self::new(ends.sent(), true));
        Ends::of(ip).map(own).or_else(quoted)
    }

    fn new(key: FlowKey, is_error: bool) -> Self {
        Self { key, is_error }
    }
}

/// The two ends of a packet. An echo message has its identifier on the side that asked, and zero on the one
/// that is to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ends {
    protocol: Protocol,
    source: SocketAddr,
    destination: SocketAddr,
}

impl Ends {
    /// Of a TCP segment, a datagram, an echo request or an echo reply; `None` for everything else.
    fn of(ip: &Ip<'_>) -> Option<Self> {
        Self::read(ip.protocol, ip.source, ip.destination, ip.payload())
    }

    /// Of the packet that an ICMP error is about, which must have gone from whom the error is for to whom
    /// it is from (RFC 792: the header, and eight bytes; RFC 4443: more). `None` for everything else.
    fn quoted_by(error: &Ip<'_>) -> Option<Self> {
        let message = error.payload();
        let kind = *message.first()?;
        let is_error = match error.protocol {
            ICMP => matches!(kind, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM),
            ICMPV6 => ERRORS_V6.contains(&kind),
            _ => false,
        };
        if !is_error {
            return None;
        }
        let quoted = Ip::parse_quote(message.get(ICMP_BYTES..)?)?;
        let is_first = quoted.part.is_none_or(|part| part.offset == 0);
        if !is_first || (quoted.source, quoted.destination) != (error.destination, error.source) {
            return None;
        }
        Self::read(
            quoted.protocol,
            quoted.source,
            quoted.destination,
            quoted.payload(),
        )
    }

    fn read(protocol: u8, source: IpAddr, destination: IpAddr, payload: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u16::from_be_bytes([*payload.get(at)?, *payload.get(at + 1)?]));
        let (protocol, from, to) = match protocol {
            TCP => (Protocol::Tcp, number(0)?, number(2)?),
            UDP => (Protocol::Udp, number(0)?, number(2)?),
            ICMP => match (payload.first()?, payload.get(1)?) {
                (&ECHO_REQUEST, 0) => (Protocol::Icmp, number(4)?, 0),
                (&ECHO_REPLY, 0) => (Protocol::Icmp, 0, number(4)?),
                _ => return None,
            },
            ICMPV6 => match (payload.first()?, payload.get(1)?) {
                (&ECHO_REQUEST_V6, 0) => (Protocol::Icmpv6, number(4)?, 0),
                (&ECHO_REPLY_V6, 0) => (Protocol::Icmpv6, 0, number(4)?),
                _ => return None,
            },
            _ => return None,
        };
        Some(Self {
            protocol,
            source: SocketAddr::new(source, from),
            destination: SocketAddr::new(destination, to),
        })
    }

    /// The flow's key in the table of the guest that sends the packet.
    fn sent(self) -> FlowKey {
        FlowKey {
            protocol: self.protocol,
            guest: self.source,
            peer: self.destination,
        }
    }

    /// The flow's key in the table of the guest that the packet comes to.
    fn received(self) -> FlowKey {
        FlowKey {
            protocol: self.protocol,
            guest: self.destination,
            peer: self.source,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 2);
    const B: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 3);

    fn packet(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![
            0x45,
            0,
            0,
            (20 + payload.len()) as u8,
            0,
            0,
            0,
            0,
            64,
            protocol,
            0,
            0,
        ];
        packet.extend_from_slice(&source.octets());
        packet.extend_from_slice(&destination.octets());
        packet.extend_from_slice(payload);
        packet
    }

    fn error(source: Ipv4Addr, destination: Ipv4Addr, about: &[u8]) -> Vec<u8> {
        packet(
            source,
            destination,
            1,
            &[&[3, 3, 0, 0, 0, 0, 0, 0], &about[..about.len().min(28)]].concat(),
        )
    }

    fn ends(bytes: &[u8]) -> Option<Ends> {
        Ends::of(&Ip::parse(bytes).unwrap())
    }

    fn quoted(bytes: &[u8]) -> Option<Ends> {
        Ends::quoted_by(&Ip::parse(bytes).unwrap())
    }

    #[test]
    fn a_question_and_its_answer_have_one_key_in_each_table() {
        let asked = ends(&packet(A, B, 1, &[8, 0, 0, 0, 0, 77, 0, 1])).unwrap();
        let answered = ends(&packet(B, A, 1, &[0, 0, 0, 0, 0, 77, 0, 1])).unwrap();
        assert_eq!(asked.sent(), answered.received());
        assert_eq!(asked.received(), answered.sent());
        assert_ne!(
            asked.sent(),
            ends(&packet(B, A, 1, &[8, 0, 0, 0, 0, 77, 0, 1]))
                .unwrap()
                .received(),
            "the other's own question, with the same identifier"
        );
    }

    #[test]
    fn an_error_is_about_what_it_quotes_if_that_went_the_other_way() {
        let datagram = packet(A, B, 17, &[1, 2, 3, 4, 0, 9, 0, 0, 5]);
        let about = quoted(&error(B, A, &datagram)).unwrap();
        assert_eq!(Some(about), ends(&datagram));
        let complaint = error(B, A, &datagram);
        let (sent, received) = (
            About::sent(&Ip::parse(&complaint).unwrap()).unwrap(),
            About::received(&Ip::parse(&complaint).unwrap()).unwrap(),
        );
        assert!(sent.is_error && received.is_error);
        assert_eq!((sent.key, received.key), (about.received(), about.sent()));
        assert_eq!(
            quoted(&error(A, B, &datagram)),
            None,
            "nobody complains of what he sent himself"
        );
        assert_eq!(
            quoted(&error(B, A, &packet(A, A, 17, &[1, 2, 3, 4, 0, 0, 0, 0]))),
            None
        );
        let mut late = datagram.clone();
        late[7] = 1;
        assert_eq!(
            quoted(&error(B, A, &late)),
            None,
            "a later fragment has no ports to show"
        );
        for length in 0..28 {
            let _ = quoted(&error(B, A, &datagram[..length]));
        }
    }

    #[test]
    fn everything_else_has_no_ends() {
        for (protocol, payload) in [
            (1, &[5, 0, 0, 0, 0, 0, 0, 0][..]),
            (1, &[8, 1, 0, 0, 0, 0, 0, 0]),
            (1, &[8]),
            (6, &[0, 1, 0]),
            (47, &[0; 8]),
        ] {
            assert_eq!(ends(&packet(A, B, protocol, payload)), None);
            assert_eq!(quoted(&packet(A, B, protocol, payload)), None);
        }
    }
}
